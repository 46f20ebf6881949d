"""Does the reward point at the error? Plants one in right answers, ranks right against wrong samples, asks the service.

Every figure stands beside that of the SFT model's plain log-prob: a comparison without it proves nothing.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from dense_reward import Client, ScoredResponse, ScoreOptions
from dense_reward.schemas import SignalName
from numpy.typing import NDArray
from tqdm import tqdm

from dense_reward_trainer.auroc import Interval, auroc, auroc_interval, mean_interval
from dense_reward_trainer.corruption import DIGITS, Corruption, corrupt, number_corruption
from dense_reward_trainer.credit_config import CreditConfig
from dense_reward_trainer.data import Demonstration, final_answer, load
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.policy import load_policy
from dense_reward_trainer.rollout import Sampling, sample
from dense_reward_trainer.runlog import check_run, open_run

Report = Callable[[str], None]
SIGNALS: tuple[SignalName, ...] = ("sft_logprob", "reward", "centred")
ITEMS_PER_REQUEST = 64


@dataclass(frozen=True, slots=True)
class Planted:
    """A right answer with one error in it."""

    demonstration: Demonstration
    corruption: Corruption


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

    Raises ConfigError where the data hold too few answers, and what the client raises where the service is not there.
    """
    check_run("credit", config)
    demonstrations = load(config.data).demonstrations
    with Client(config.service_url) as client:
        client.wait_until_ready(60.0)
        planted = plant(demonstrations, config)
        localisation = localise(client, planted, config)
        right, wrong = rank(client, demonstrations, config, report) if config.policy is not None else ({}, {})
        model = client.models()[0]
    ranking = {name: auroc_interval(right[name], wrong[name], config.seed) for name in right} or None
    counts = len(right.get("reward", [])), len(wrong.get("reward", []))
    result = CreditResult(localisation, len(planted), ranking, *counts)
    report(table(result, config))
    record = {"result": asdict(result), "config": config.model_dump(mode="json"), "model": model.model_dump()}
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


def localise(client: Client, planted: Sequence[Planted], config: CreditConfig) -> dict[str, Interval]:
    """For each signal the AUROC of the first wrong token being lower than the others of its answer, mean over answers.

    A wrong number of several tokens is wrong from its first changed token on; its later tokens are in neither group.
    """
    areas: dict[str, list[float]] = {name: [] for name in SIGNALS}
    for start in tqdm(range(0, len(planted), ITEMS_PER_REQUEST), desc="planted errors", unit="request"):
        part = planted[start : start + ITEMS_PER_REQUEST]
        items = [_item(one.demonstration, one.corruption.text) for one in part]
        options = ScoreOptions(include=[*SIGNALS, "offsets", "token_ids"])
        for one, scored in zip(part, client.score_items(items, options=options).results, strict=True):
            error, others = groups(one, _offsets(scored), config.against)
            for name in SIGNALS:
                values_T = _signal(scored, name)
                areas[name].append(auroc(-values_T[[error]], -values_T[others]))
    return {name: mean_interval(values, config.seed) for name, values in areas.items()}


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
    client: Client, demonstrations: Sequence[Demonstration], config: CreditConfig, report: Report
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Sums over each sampled answer by signal, for right and for wrong answers."""
    if config.policy is None:
        raise ConfigError("ranking needs a policy whose answers are sampled: give policy")
    known = [demonstration for demonstration in demonstrations if demonstration.answer is not None]
    if not known:
        raise ConfigError("no demonstration states its final answer, so right and wrong cannot be told apart")
    checkpoint = load_policy(config.policy, precision="float32", device=config.device)
    each = -(-config.samples // len(known))
    asked = known[: -(-config.samples // each)]
    prompts = [checkpoint.encoder.chat_prompt(_messages(one)[:-1]) for one in asked]
    report(f"sampling {config.samples} answers to {len(asked)} prompts")
    rollouts = sample(checkpoint.policy, prompts, Sampling(config.max_new_tokens, each, batch_size=256), config.seed)
    groups_of: tuple[dict[str, list[float]], dict[str, list[float]]] = (
        {name: [] for name in SIGNALS},
        {name: [] for name in SIGNALS},
    )
    options = ScoreOptions(include=list(SIGNALS))
    for index, rollout in enumerate(tqdm(rollouts[: config.samples], desc="sampled answers", unit="answer")):
        text = checkpoint.encoder.tokenizer.text_and_spans(rollout.response_T[: -1 if rollout.finished else None])[0]
        right = rollout.finished and final_answer(text) == asked[index // each].answer
        scored = client.score_ids(rollout.prompt_P, [rollout.response_T], options=options).results[0]
        for name in SIGNALS:
            groups_of[0 if right else 1][name].append(float(_signal(scored, name).sum()))
    return groups_of


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
        raise RuntimeError("the service answered without offsets")
    return [(int(start), int(end)) for start, end in scored.offsets]


def _signal(scored: ScoredResponse, name: SignalName) -> NDArray[np.float32]:
    values_T: NDArray[np.float32] | None = getattr(scored, name)
    if values_T is None:
        raise RuntimeError(f"the service answered without {name}")
    return values_T
