"""The `evaluate` job: measures policies on held-out prompts; writes a table, the figures as JSON and every response.

Read from `run` downwards. All policies answer the same prompts, with the same seed. Each policy is kept as soon as it
is measured, so a stopped job continues.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace

import torch
from dense_reward.checkpoints.atomic_file import write_whole
from dense_reward.engines.torch.device import chosen_device
from dense_reward.records import Report

from dense_reward_trainer.configs.dpr import HeldOutOptions
from dense_reward_trainer.configs.evaluate import ChooseOptions, EvaluateConfig, PolicyOptions
from dense_reward_trainer.configs.signals import TokenSignal
from dense_reward_trainer.data.final_answers import meaning_of_right
from dense_reward_trainer.data.sources import Demonstration, data_sha256
from dense_reward_trainer.policies.chosen import measure_chosen
from dense_reward_trainer.policies.comparison import verdict_lines
from dense_reward_trainer.policies.kept import KeptPolicy, inputs_of, keep, kept_policy, kept_samples
from dense_reward_trainer.policies.load import check_sampled, load_sampled
from dense_reward_trainer.policies.response_figures import ResponseFigures, response_figures
from dense_reward_trainer.policies.signals import check_offered, sample_signals
from dense_reward_trainer.rl.held_out_metrics import (
    Estimate,
    HeldOutResult,
    draw_held_out,
    held_out_sampling,
    measure_held_out,
)
from dense_reward_trainer.rl.prompts import encoded_held_out, load_held_out
from dense_reward_trainer.rl.records import TokenRewards
from dense_reward_trainer.rl.reward_service import (
    PinnedPair,
    ServiceAddress,
    ServiceRewards,
    pinned_pair,
    pinned_pairs,
)
from dense_reward_trainer.rl.sampling import Sampling, counted
from dense_reward_trainer.runs.next_step import finished, report_page
from dense_reward_trainer.runs.progress import Progress
from dense_reward_trainer.runs.run_folder import Run, check_run, open_run, pin
from dense_reward_trainer.text_table import aligned

Value = Estimate | float | None
# title of a column -> its value
COLUMNS: Mapping[str, Callable[[HeldOutResult], Value]] = {
    "greedy accuracy": lambda result: result.greedy_accuracy,
    "sampled accuracy": lambda result: result.sampled_accuracy,
    "NLL per token": lambda result: result.nll_per_token,
    "KL to SFT": lambda result: result.kl_to_sft,
    "length": lambda result: result.length_tokens,
    "cut off": lambda result: result.truncated,
}


@dataclass(frozen=True, slots=True, eq=False)
class PinnedService:
    """The pairs of the service, pinned once, so that all rows of the table have the same models.

    `sft`: one whose SFT model the KL is measured to; null without a service. `choosing`: those whose signals choose
    among samples, by `pair_name`.
    """

    sft: PinnedPair | None
    choosing: Mapping[str | None, PinnedPair]

    @property
    def sft_model_rewards(self) -> TokenRewards | None:
        """Log-probs of the SFT model; None without a service."""
        return None if self.sft is None else ServiceRewards(self.sft, "sft_logprob", with_kl=False)

    def pairs_of(self, config: EvaluateConfig, name: str) -> dict[str, str]:
        """The pairs that score a policy: name at the service -> revision."""
        choose = config.policies[name].choose
        if choose is None:
            pair = self.sft
        else:
            pair = None if choose.signal is None else self.choosing[pair_name(config, choose)]
        return {} if pair is None else {pair.card.name: pair.card.revision}

    def check_tokenizer(self, choosing: Iterable[str | None], tokenizer_sha256: str) -> None:
        """Raises JobError if a pair that a policy needs has a different tokenizer; `choosing`: the names of some."""
        needed = [self.sft, *(self.choosing[name] for name in choosing)]
        for pair in needed:
            if pair is not None:
                pair.check_tokenizer(tokenizer_sha256)


@dataclass(frozen=True, slots=True)
class Group:
    """Policies that share their samples. `names`: all of them; `sampled`: how the samples are drawn."""

    names: tuple[str, ...]
    sampled: PolicyOptions
    sampling: Sampling

    def responses(self, config: EvaluateConfig, prompts: int, names: Collection[str]) -> int:
        """How many responses are generated to measure these policies of the group."""
        greedy = sum(config.policies[name].choose is None for name in names)
        return prompts * (self.sampling.group_size + greedy) if names else 0


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """An evaluation under way: what all policies are measured with. `missing`: those not measured by earlier starts."""

    config: EvaluateConfig
    demonstrations: Sequence[Demonstration]
    service: PinnedService
    inputs: Mapping[str, Mapping[str, str]]
    missing: Collection[str]
    run: Run


def run(config: EvaluateConfig, report: Report) -> None:
    """Writes `evaluation.json` and `samples-NAME.jsonl` to `config.output_dir`, and reports a table.

    A stopped job goes on with the policies that it has not measured. Raises ConfigError, DataError, CheckpointError or
    JobError before the first measurement if a path cannot be used; the message states the cure.
    """
    check_run("evaluate", config)
    manifests = {name: check_sampled(options) for name, options in config.policies.items()}
    demonstrations = load_held_out(config.held_out, report)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with pinned_service(config, report) as service:
        if service.sft is not None:
            report(f"KL to SFT: to the SFT model of the service, {service.sft.card.sft}")
        for name, options in config.policies.items():
            own = manifests[name][str(options.checkpoint)]
            service.check_tokenizer(signals_of_choices(config, [options.choose]), own.tokenizer_sha256)
        opened = open_run("evaluate", config)
        pin(opened, {"held-out prompts": data_sha256(demonstrations)})
        inputs = {
            name: inputs_of(config.policies[name], manifests[name], service.pairs_of(config, name), size)
            for group in groups_of(config)
            for name, size in dict.fromkeys(group.names, group.sampling.group_size).items()
        }
        kept = {name: kept_policy(opened.folder, name, inputs[name], report) for name in config.policies}
        missing = [name for name, one in kept.items() if one is None]
        evaluation = Evaluation(config, demonstrations, service, inputs, missing, opened)
        measured = measure_missing(evaluation, report) if missing else {}
    found = {name: measured[name] if one is None else one for name, one in kept.items()}
    finish(opened, found, config, report)


def groups_of(config: EvaluateConfig) -> list[Group]:
    """The policies, grouped by what they sample."""
    groups = []
    for sampled in dict.fromkeys(options.sampled for options in config.policies.values()):
        names = tuple(name for name, options in config.policies.items() if options.sampled == sampled)
        choices = [config.policies[name].choose for name in names]
        groups.append(Group(names, sampled, shared_sampling(config.held_out_options, sampled, choices)))
    return groups


def measure_missing(evaluation: Evaluation, report: Report) -> dict[str, KeptPolicy]:
    """Measures the missing policies, one group after another; each is kept as soon as it is measured."""
    config = evaluation.config
    prompts = min(config.held_out_options.limit or len(evaluation.demonstrations), len(evaluation.demonstrations))
    work = [(group, [name for name in group.names if name in evaluation.missing]) for group in groups_of(config)]
    total = sum(group.responses(config, prompts, names) for group, names in work)
    measured: dict[str, KeptPolicy] = {}
    with Progress(total, "responses") as progress:
        above = progress.beside(report)
        if len(evaluation.missing) < len(config.policies):
            above(f"measured by an earlier start: {len(config.policies) - len(evaluation.missing)} policies")
        for group, names in work:
            if names:
                above(f"measuring {', '.join(names)} ({group.sampled.checkpoint})")
                measured |= measure_group(evaluation, group, names, progress, above)
    return measured


def measure_group(
    evaluation: Evaluation, group: Group, names: Sequence[str], progress: Progress, report: Report
) -> dict[str, KeptPolicy]:
    """Measures some policies of a group on the held-out prompts, rendered as in training."""
    config, service = evaluation.config, evaluation.service
    options = config.held_out_options
    checkpoint = load_sampled(group.sampled, report, precision=config.precision, device=chosen_device(config.device))
    limit_tokens = checkpoint.policy.limit_tokens
    rows = encoded_held_out(evaluation.demonstrations, checkpoint.encoder, limit_tokens, options.max_new_tokens)
    choices = {name: config.policies[name].choose for name in names}
    drawn = draw_held_out(checkpoint, rows, options, group.sampling, counted(progress))
    wanted = signals_of_choices(config, choices.values())
    signals = {pair: sample_signals(service.choosing[pair], drawn.rollouts, found) for pair, found in wanted.items()}
    measured: dict[str, KeptPolicy] = {}
    for name, choose in choices.items():
        if choose is None:
            own = drawn.first(options.samples_per_prompt)
            rewards = service.sft_model_rewards
            result, samples = measure_held_out(checkpoint, rows, options, rewards, own, on_batch=counted(progress))
        else:
            scores = signals.get(pair_name(config, choose))
            result, samples = measure_chosen(checkpoint, rows, options, drawn, choose, signals=scores)
        pairs, inputs = service.pairs_of(config, name), evaluation.inputs[name]
        measured[name] = keep(evaluation.run.folder, name, result, samples, pairs=pairs, inputs=inputs)
    return measured


def finish(opened: Run, measured: Mapping[str, KeptPolicy], config: EvaluateConfig, report: Report) -> None:
    """Writes and reports the figures of all policies, what they mean, and which policy is better."""
    samples = {name: kept_samples(opened.folder, name) for name in measured}
    texts = {name: response_figures(found, config.pass_at) for name, found in samples.items()}
    figures = {
        name: {**asdict(kept.figures), **asdict(texts[name]), "pairs": kept.pairs} for name, kept in measured.items()
    }
    path = opened.folder / "evaluation.json"
    write_whole(path, json.dumps(figures, indent=2, allow_nan=False).encode() + b"\n")
    report(evaluation_table({name: kept.figures for name, kept in measured.items()}, texts))
    report("\n".join([meaning_of_right(config.held_out_options.checker), *verdict_lines(samples)]))
    report(finished(path, report_page(opened.folder)))


def shared_sampling(
    options: HeldOutOptions, sampled: PolicyOptions, choices: Collection[ChooseOptions | None]
) -> Sampling:
    """How the samples are drawn that several policies share: as many as the policy with the most samples needs."""
    sizes = [options.samples_per_prompt if choose is None else choose.samples for choose in choices]
    own = replace(held_out_sampling(options), temperature=sampled.temperature, top_p=sampled.top_p, min_p=sampled.min_p)
    return replace(own, group_size=max(sizes))


def pair_name(config: EvaluateConfig, choose: ChooseOptions) -> str | None:
    """The pair at the service whose signal chooses; None: its only pair."""
    return choose.pair or config.service_pair


def signals_of_choices(
    config: EvaluateConfig, choices: Iterable[ChooseOptions | None]
) -> dict[str | None, set[TokenSignal]]:
    """The signals that choose among samples, by `pair_name`."""
    wanted: dict[str | None, set[TokenSignal]] = {}
    for choose in choices:
        if choose is not None and choose.signal is not None:
            wanted.setdefault(pair_name(config, choose), set()).add(choose.signal)
    return wanted


@contextmanager
def pinned_service(config: EvaluateConfig, report: Report) -> Iterator[PinnedService]:
    """Pins all pairs that the table needs; of those that the KL could be measured by, the first.

    Raises ConfigError if a pair does not offer a signal, and what `pinned_pair` raises.
    """
    if config.service_url is None:
        yield PinnedService(None, {})
        return
    address = ServiceAddress.of(config.service_url, config)
    wanted = signals_of_choices(config, [options.choose for options in config.policies.values()])
    with ExitStack() as stack:
        names = None if address.pair is None else [address.pair]
        pair, *_ = stack.enter_context(pinned_pairs(address, names, report))
        choosing: dict[str | None, PinnedPair] = {}
        for name, signals in wanted.items():
            choosing[name] = stack.enter_context(pinned_pair(replace(address, pair=name), report))
            check_offered(choosing[name], signals)
        yield PinnedService(pair, choosing)


def evaluation_table(results: Mapping[str, HeldOutResult], texts: Mapping[str, ResponseFigures]) -> str:
    """One aligned line for each policy: each mean with its standard error. The last line has the units."""
    ks = sorted({k for text in texts.values() for k in text.pass_at})
    rows = [["policy", *COLUMNS, *(f"pass@{k}" for k in ks), "distinct-1", "distinct-2", "refusals"]]
    for name, result in results.items():
        text = texts[name]
        values: list[Value] = [column(result) for column in COLUMNS.values()]
        values += [*(text.pass_at.get(k) for k in ks), text.distinct_1, text.distinct_2, text.refusals]
        rows.append([name, *map(_cell, values)])
    return f"{aligned(rows)}\n± standard error; NLL in nats per token, KL in nats per response, length in tokens"


def _cell(value: Value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}"
    error = "?" if value.standard_error is None else f"{value.standard_error:.3f}"
    return f"{value.value:z.3f} ± {error}"
