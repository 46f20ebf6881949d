"""Does the reward point at the error? Plants one in right answers, ranks right against wrong samples, asks the service.

Every figure stands beside that of the SFT model's plain log-prob: a comparison without it proves nothing.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from dense_reward import ScoredResponse
from dense_reward.schemas import SignalName
from numpy.typing import NDArray
from tqdm import tqdm

from dense_reward_trainer.auroc import Interval, auroc, auroc_interval, mean_interval
from dense_reward_trainer.corruption import DIGITS, Corruption, corrupt, number_corruption
from dense_reward_trainer.credit_config import CreditConfig
from dense_reward_trainer.data import Demonstration, final_answer, load
from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.policy import PolicyCheckpoint, chosen_device, load_policy
from dense_reward_trainer.prompts import check_room_at_service
from dense_reward_trainer.rollout import Rollout, Sampling, sample
from dense_reward_trainer.runlog import check_run, open_run
from dense_reward_trainer.token_rewards import PinnedPair, ServiceAddress, pinned_pair, requests

Report = Callable[[str], None]
IsRight = Callable[[Demonstration, str], bool]
SIGNALS: tuple[SignalName, ...] = ("sft_logprob", "reward", "centred")
ITEMS_PER_REQUEST = 64


@dataclass(frozen=True, slots=True)
class Planted:
    """A right answer with one error in it."""

    demonstration: Demonstration
    corruption: Corruption


@dataclass(frozen=True, slots=True)
class Sums:
    """Of each sampled answer, by signal: in nats, over its tokens."""

    right: dict[str, list[float]]
    wrong: dict[str, list[float]]

    @property
    def counts(self) -> tuple[int, int]:
        """Right answers and wrong ones."""
        return len(self.right["reward"]), len(self.wrong["reward"])

    def intervals(self, seed: int) -> dict[str, Interval]:
        """By signal, the AUROC of right against wrong. Raises ConfigError where one of them is missing."""
        right, wrong = self.counts
        if not right or not wrong:
            raise ConfigError(
                f"{right} samples are right and {wrong} are wrong, but ranking compares the two: raise samples, give "
                "another policy, or set policy=null to measure planted errors alone"
            )
        return {name: auroc_interval(self.right[name], self.wrong[name], seed) for name in SIGNALS}


@dataclass(frozen=True, slots=True)
class CreditResult:
    """AUROCs by signal, with 95 % bootstrap intervals; `ranking` is null where no policy was sampled."""

    localisation: dict[str, Interval]
    answers: int
    ranking: dict[str, Interval] | None
    right: int
    wrong: int


def run(config: CreditConfig, report: Report) -> CreditResult:
    """Measure, print a table, and leave credit.json in the run folder.

    Raises ConfigError where the data hold too few answers or the samples too few kinds, DataError, CheckpointError or
    JobError, naming the cure.
    """
    check_run("credit", config)
    demonstrations = load(config.data).demonstrations
    planted = plant(demonstrations, config)
    policy = _policy(config)
    with pinned_pair(ServiceAddress.of(config.service_url, config), report) as pair:
        localisation = localise(pair, planted, config)
        sums = None if policy is None else rank(pair, policy, demonstrations, config, report=report)
    ranking = None if sums is None else sums.intervals(config.seed)
    result = CreditResult(localisation, len(planted), ranking, *((0, 0) if sums is None else sums.counts))
    report(table(result, config))
    record = {"result": asdict(result), "config": config.model_dump(mode="json"), "model": pair.card.model_dump()}
    (open_run("credit", config).folder / "credit.json").write_text(json.dumps(record, indent=2) + "\n")
    return result


def plant(demonstrations: Sequence[Demonstration], config: CreditConfig) -> list[Planted]:
    """One seeded error in each of the first `config.answers` answers that hold a number.

    Raises ConfigError where there are fewer.
    """
    rng = random.Random(config.seed)
    planted = []
    for demonstration in demonstrations:
        if any(character in DIGITS for character in demonstration.response):
            error = (corrupt if config.corruption == "digit" else number_corruption)(demonstration.response, rng)
            if error is not None:
                planted.append(Planted(demonstration, error))
    if len(planted) < config.answers:
        raise ConfigError(f"{len(planted)} answers hold a number, answers asks for {config.answers}: lower it")
    return planted[: config.answers]


def _policy(config: CreditConfig) -> PolicyCheckpoint | None:
    if config.policy is None:
        return None
    return load_policy(config.policy, precision="float32", device=chosen_device(config.device))


def localise(pair: PinnedPair, planted: Sequence[Planted], config: CreditConfig) -> dict[str, Interval]:
    """For each signal the AUROC of the first wrong token being lower than the others of its answer, mean over answers.

    A wrong number of several tokens is wrong from its first changed token on; its later tokens are in neither group.
    Raises ConfigError where an error has nothing to stand out from.
    """
    areas: dict[str, list[float]] = {name: [] for name in SIGNALS}
    for start in tqdm(range(0, len(planted), ITEMS_PER_REQUEST), desc="planted errors", unit="request"):
        part = planted[start : start + ITEMS_PER_REQUEST]
        items = [_item(one.demonstration, one.corruption.text) for one in part]
        results = pair.ask(items, [*SIGNALS, "offsets", "token_ids"]).results
        for one, scored in zip(part, results, strict=True):
            error, others = groups(one, _offsets(scored), config.against)
            if not others:
                raise ConfigError(f"{one.demonstration.source}: no other token has a digit: set against=tokens")
            for name in SIGNALS:
                values_T = _signal(scored, name)
                areas[name].append(auroc(-values_T[[error]], -values_T[others]))
    return {name: mean_interval(values, config.seed) for name, values in areas.items()}


def has_its_answer(demonstration: Demonstration, text: str) -> bool:
    """Whether a sampled answer ends as the demonstration does."""
    return final_answer(text) == demonstration.answer


def groups(
    planted: Planted, offsets: Sequence[tuple[int, int]], against: Literal["tokens", "digit_tokens"]
) -> tuple[int, list[int]]:
    """The first wrong token, and the tokens that it must stand out from (those of the planted error left out)."""
    text, right = planted.corruption.text, planted.demonstration.response
    span = range(planted.corruption.start, planted.corruption.end)
    wrong = [t for t, (start, end) in enumerate(offsets) if any(text[i] != right[i] for i in range(start, end))]
    touched = {t for t, (start, end) in enumerate(offsets) if start < span.stop and end > span.start}
    others = [t for t in range(len(offsets)) if t not in touched]
    if against == "digit_tokens":
        others = [t for t in others if any(c in DIGITS for c in text[offsets[t][0] : offsets[t][1]])]
    return wrong[0], others


def rank(
    pair: PinnedPair,
    checkpoint: PolicyCheckpoint,
    demonstrations: Sequence[Demonstration],
    config: CreditConfig,
    *,
    report: Report,
    is_right: IsRight = has_its_answer,
) -> Sums:
    """What the pair pays for sampled answers, right and wrong ones; `is_right` judges those that were not cut off.

    Raises ConfigError where no answer is known or a prompt leaves no room; JobError where the service cannot score the
    samples.
    """
    known = [demonstration for demonstration in demonstrations if demonstration.answer is not None]
    if not known:
        raise ConfigError("no demonstration states its final answer, so right and wrong cannot be told apart")
    pair.check_tokenizer(checkpoint.manifest.tokenizer_sha256)
    each = -(-config.samples // len(known))
    asked = known[: -(-config.samples // each)]
    prompts = [checkpoint.encoder.chat_prompt(_messages(one)[:-1]) for one in asked]
    check_room_at_service(pair.card.max_length_tokens, prompts, config.max_new_tokens)
    report(f"sampling {config.samples} answers to {len(asked)} prompts")
    rollouts = sample(checkpoint.policy, prompts, Sampling(config.max_new_tokens, each, batch_size=256), config.seed)
    rollouts = rollouts[: config.samples]
    sums = Sums({name: [] for name in SIGNALS}, {name: [] for name in SIGNALS})
    for index, (rollout, scored) in enumerate(zip(rollouts, _scored(pair, rollouts), strict=True)):
        body_T = rollout.response_T[:-1] if rollout.finished else rollout.response_T
        text = checkpoint.encoder.tokenizer.text_and_spans([int(i) for i in body_T])[0]
        right = rollout.finished and is_right(asked[index // each], text)
        for name in SIGNALS:
            (sums.right if right else sums.wrong)[name].append(float(_signal(scored, name).sum(dtype=np.float64)))
    return sums


def _scored(pair: PinnedPair, rollouts: Sequence[Rollout]) -> Iterator[ScoredResponse]:
    with tqdm(total=len(rollouts), desc="sampled answers", unit="answer") as bar:
        for items in requests(rollouts, pair.request_tokens):
            results = pair.ask(items, SIGNALS).results
            bar.update(len(results))
            yield from results


def table(result: CreditResult, config: CreditConfig) -> str:
    """The result for people."""
    lines = [
        f"AUROC of the corrupted {config.corruption} against the other {config.against.replace('_', ' ')} "
        f"of its answer, mean over {result.answers} answers",
        *_rows(result.localisation),
    ]
    if result.ranking is not None:
        lines += [f"AUROC of {result.right} right against {result.wrong} wrong samples, summed", *_rows(result.ranking)]
    return "\n".join(lines)


def _rows(intervals: dict[str, Interval]) -> list[str]:
    return [f"  {name:12} {x.value:.3f}  [{x.low:.3f}, {x.high:.3f}]" for name, x in intervals.items()]


def _messages(demonstration: Demonstration) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in demonstration.messages]


def _item(demonstration: Demonstration, response: str) -> dict[str, object]:
    return {"messages": [*_messages(demonstration)[:-1], {"role": "assistant", "content": response}]}


def _offsets(scored: ScoredResponse) -> list[tuple[int, int]]:
    if scored.offsets is None:
        raise JobError("the service answered without offsets")
    return [(int(start), int(end)) for start, end in scored.offsets]


def _signal(scored: ScoredResponse, name: SignalName) -> NDArray[np.float32]:
    values_T: NDArray[np.float32] | None = getattr(scored, name)
    if values_T is None:
        raise JobError(f"the service answered without {name}")
    return values_T
