"""The stages of a round of RFT. Each leaves a file or a checkpoint that appears whole, and is skipped once it is there.

Round n: pairs/N.jsonl, checkpoints/token_head-N, checkpoints/policy-N; their logs are in logs/.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from dense_reward.checkpoints.atomic_file import write_whole
from dense_reward.checkpoints.probe import ProbeIds
from dense_reward.checkpoints.write_manifest import ManifestFacts
from dense_reward.engines.token_head.engine import HeadModel, load_head
from dense_reward.engines.torch.weights import load_weights, weight_folders
from dense_reward.manifest import Manifest, Role, check_same_texts, files_folder, load_manifest, verify_files
from dense_reward.records import Report
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dense_reward_trainer.configs.rft import PolicyStepOptions, RftConfig
from dense_reward_trainer.data.tokenised import TokenisedRow
from dense_reward_trainer.errors import JobError
from dense_reward_trainer.reward_model.head import new_head
from dense_reward_trainer.reward_model.head_rewards import HeadRewards, SftLogprobs
from dense_reward_trainer.reward_model.pair_trainer import Place, judge, train_head
from dense_reward_trainer.reward_model.pairs import AnswerPair, differing, pairs_sha256, read_pairs, write_pairs
from dense_reward_trainer.rl.held_out_metrics import measure_held_out
from dense_reward_trainer.rl.learner import Learner, seed_of
from dense_reward_trainer.rl.policy import PolicyCheckpoint, load_policy
from dense_reward_trainer.rl.prompts import prompts_of_step
from dense_reward_trainer.rl.records import Rollout
from dense_reward_trainer.rl.sampling import Sampling, counted, sample
from dense_reward_trainer.runs.checkpoint import is_complete, recover, write_checkpoint
from dense_reward_trainer.runs.progress import Progress
from dense_reward_trainer.runs.run_folder import METRICS_NAME, MetricsLog, Run


@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """What all rounds of a run share. `start` is the SFT model; it never changes."""

    config: RftConfig
    start: PolicyCheckpoint
    rows: Sequence[TokenisedRow]
    held_out: Sequence[TokenisedRow]
    run: Run

    @property
    def share(self) -> int:
        """Demonstrations of one round."""
        return self.config.demonstrations_per_round or max(1, len(self.rows) // self.config.rounds)

    @property
    def device(self) -> str:
        return str(self.start.policy.device)

    def pairs_file(self, n: int) -> Path:
        return self.run.folder / "pairs" / f"{n}.jsonl"

    def head_folder(self, n: int) -> Path:
        return self.run.folder / "checkpoints" / f"token_head-{n}"

    def policy_folder(self, n: int) -> Path:
        """The policy after round n; that of round 0 is the SFT model."""
        return self.run.folder / "checkpoints" / f"policy-{n}" if n else self.config.policy

    def log(self, stage: str, n: int) -> MetricsLog:
        return MetricsLog(self.run.folder / "logs" / f"{stage}-{n}.jsonl")

    def policy(self, n: int) -> PolicyCheckpoint:
        """The policy after round n, read from disk."""
        return load_policy(self.policy_folder(n), precision=self.config.precision, device=self.device)

    def seed(self, n: int) -> int:
        return seed_of(self.config.seed, n)


def answer(setting: Setting, n: int, report: Report) -> list[AnswerPair]:
    """Stage 1: answers of the policy after round n - 1 to the prompts of the round's share, beside the demonstrations.

    Returns all pairs of the round, also those whose responses are equal.
    """
    path = setting.pairs_file(n)
    if path.is_file():
        return read_pairs(path)
    config = setting.config
    rows = _share(setting, n)
    report(f"round {n} of {config.rounds}: answering {len(rows)} prompts")
    sampling = Sampling(config.max_new_tokens, 1, config.temperature, batch_size=config.rollout_batch_size)
    with Progress(len(rows), "answers") as progress:
        prompts = [row.encoded.prompt_P for row in rows]
        rollouts = sample(setting.policy(n - 1).policy, prompts, sampling, setting.seed(n), counted(progress))
    pairs = [
        AnswerPair(rollout.prompt_P, row.encoded.responses[0].ids_T, rollout.response_T, rollout.finished)
        for row, rollout in zip(rows, rollouts, strict=True)
    ]
    write_pairs(path, pairs)
    equal, cut = len(pairs) - len(differing(pairs)), sum(not pair.finished for pair in pairs)
    report(f"{path}: {equal} of {len(pairs)} answers equal their demonstration, {cut} were cut off (max_new_tokens)")
    return pairs


def _share(setting: Setting, n: int) -> list[TokenisedRow]:
    """The demonstrations of round n: disjoint from those of other rounds until all were used, in a seeded order."""
    return prompts_of_step(setting.rows, n, setting.share, setting.config.seed)


def learn_head(setting: Setting, n: int, pairs: Sequence[AnswerPair], report: Report) -> None:
    """Stage 2: a head on the pairs of this round, and of earlier ones with `earlier_pairs`.

    Raises JobError if no pair is left, or if pairs were changed after a head has learnt from them.
    """
    config, folder = setting.config, setting.head_folder(n)
    first = 1 if config.earlier_pairs else n
    earlier = [pair for m in range(first, n) for pair in _train_part(setting, read_pairs(setting.pairs_file(m)))[0]]
    own, judged = _train_part(setting, pairs)
    train = differing([*earlier, *own])
    data = pairs_sha256([*train, *judged])
    recover(folder)
    if is_complete(folder):
        if load_manifest(folder).data_sha256 != data:
            raise JobError(
                f"{folder} has learnt from other pairs than those in {setting.pairs_file(n).parent}: restore "
                "them, or use another output_dir"
            )
        return
    if not train:
        raise JobError(
            f"all {len(pairs)} answers of round {n} equal their demonstrations, so there is nothing to tell apart: use "
            "a policy that makes mistakes, or raise temperature"
        )
    report(f"round {n} of {config.rounds}: a head on {len(train)} pairs, judged on {len(judged)} others")
    model, tokenizer, manifest = _head_to_train(setting, n)
    log = _fresh(setting.log("head", n))
    place = Place(setting.run.folder / "logs", setting.device, config.precision, setting.seed(n))
    train_head(model, train, config.head, place, log)
    found = judge(model, judged, config.head.loss, config.microbatch_tokens)
    if found is not None:
        log.append(0, {f"judged_{name}": float(value) for name, value in asdict(found).items()})
        report(
            f"on {found.pairs} pairs that it has not learnt from, accuracy {found.accuracy:.3f}, {found.loss:.3f} nats"
        )
    write(setting, n, model, (tokenizer, manifest), data, role="token_head")


def _train_part(setting: Setting, pairs: Sequence[AnswerPair]) -> tuple[list[AnswerPair], list[AnswerPair]]:
    """A round's pairs to learn from, and the last ones, to judge on. They are in a random order."""
    count = len(pairs) - int(len(pairs) * setting.config.held_out_pairs)
    return [*pairs[:count]], [*pairs[count:]]


def _head_to_train(setting: Setting, n: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Manifest]:
    """The model that round n starts from, in float32, its tokenizer, and the manifest of its checkpoint."""
    config, warm = setting.config, n > 1 and setting.config.warm_start
    folder = setting.head_folder(n - 1) if warm else config.head_start or config.policy
    manifest = load_manifest(folder)
    check_same_texts(setting.start.manifest, manifest)
    verify_files(folder, manifest)
    tokenizer = _tokenizer(folder, manifest)
    is_head = manifest.role == "token_head"
    model = load_weights(*weight_folders(folder, manifest), torch.float32, head=is_head).to(setting.device)
    model = model if is_head else new_head(model, tokenizer)
    return model.requires_grad_(True), tokenizer, manifest


def learn_policy(setting: Setting, n: int, options: PolicyStepOptions, report: Report) -> None:
    """Stage 3: policy steps on the head of this round, from the policy of the round before."""
    folder = setting.policy_folder(n)
    recover(folder)
    if is_complete(folder):
        return
    config = setting.config
    report(f"round {n} of {config.rounds}: {options.steps} steps of the policy on the head")
    checkpoint = setting.policy(n - 1)
    rewards = HeadRewards(_head(setting, n), setting.start.policy, config.microbatch_tokens)
    pairs = read_pairs(setting.pairs_file(n))
    rewards = rewards.with_zero_at_mean([Rollout(p.prompt_P, p.answer_T, p.finished) for p in pairs])
    learner = Learner.of(config.learner(options, setting.seed(n)), checkpoint.policy)
    prompts = [row.encoded.prompt_P for row in setting.rows]
    log = _fresh(setting.log("policy", n))
    sampled = options.prompts_per_step * options.group_size
    with Progress(options.steps, "steps") as progress:
        for step in range(1, options.steps + 1):
            metrics = learner.step(step, prompts, rewards)
            log.append(step, metrics)
            note = f"reward {metrics['reward_sum']:.2f}, kl {metrics['kl_to_sft']:.2f}"
            progress.advance(tokens=round(metrics["length_mean"] * sampled), note=note)
    tokenizer = _tokenizer(setting.policy_folder(n - 1), checkpoint.manifest)
    data = load_manifest(setting.head_folder(n)).data_sha256
    write(setting, n, learner.result.model, (tokenizer, checkpoint.manifest), data, role="policy")


def measure(setting: Setting, n: int, report: Report) -> None:
    """Measures the policy after round n on the held-out rows, once; also its KL to the SFT model, which is at hand."""
    log = setting.log("held_out", n)
    if not setting.held_out or log.read():
        return
    options = setting.config.held_out_options
    prompts = len(setting.held_out[: options.limit])
    when = f"after round {n}" if n else "before round 1"
    report(f"measuring the policy {when} on {prompts} held-out prompts")
    sft = SftLogprobs(setting.start.policy, options.microbatch_tokens)
    with Progress(prompts * (1 + options.samples_per_prompt), "responses") as progress:
        result, _ = measure_held_out(setting.policy(n), setting.held_out, options, sft, on_batch=counted(progress))
    _fresh(log).append(n, result.numbers())


def write_metrics(setting: Setting, last: int) -> None:
    """metrics.jsonl: a line for each round up to `last`, from the logs of its stages."""
    lines = MetricsLog(setting.run.folder / METRICS_NAME)
    write_whole(lines.path, b"")
    for n in range(last + 1):
        values: dict[str, float | None] = {}
        for stage in ("head", "policy", "held_out"):
            for line in setting.log(stage, n).read():
                values |= {f"{stage}_{name}": value for name, value in line.items() if name != "step"}
        if values:
            lines.append(n, values)


def _head(setting: Setting, n: int) -> HeadModel:
    folder = setting.head_folder(n)
    manifest = load_manifest(folder)
    verify_files(folder, manifest)
    return load_head(folder, manifest, dtype="float32", device=setting.device)


def _tokenizer(folder: Path, manifest: Manifest) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        files_folder(folder, manifest), local_files_only=True, trust_remote_code=False
    )
    return tokenizer


def _fresh(log: MetricsLog) -> MetricsLog:
    """The log without the lines of a stage that was killed."""
    log.path.parent.mkdir(parents=True, exist_ok=True)
    log.path.unlink(missing_ok=True)
    return log


def write(
    setting: Setting,
    n: int,
    model: PreTrainedModel,
    start: tuple[PreTrainedTokenizerBase, Manifest],
    data_sha256: str | None,
    *,
    role: Role,
) -> None:
    """Writes a checkpoint of round n, with the tokenizer and the probe sequences of the one that it started from."""
    manifest, (tokenizer, started) = setting.start.manifest, start
    folder = setting.head_folder(n) if role == "token_head" else setting.policy_folder(n)
    probe = [ProbeIds(s.prompt_ids, tuple(response.ids for response in s.responses)) for s in started.probe]
    facts = ManifestFacts(
        role=role,
        run_id=setting.run.run_id,
        renderer=manifest.renderer,
        end_of_turn_id=manifest.end_of_turn_id,
        choices=manifest.choices,
        optimiser_step=n,
        base_model=str(setting.config.policy),
        data_sha256=data_sha256,
        seed=setting.config.seed,
        dtype="float32",
    )
    write_checkpoint(folder, model, tokenizer, facts, lambda *_: probe, device=setting.device)
