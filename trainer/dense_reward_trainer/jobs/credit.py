"""The `credit` job: do rewards locate errors planted in right answers, and rank right above wrong samples?

All references of a run are compared in one table, by every signal and aggregate, beside the signals of the SFT model
alone, which the reward must beat. The last lines say which reference to use, or that none helps.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from dense_reward.checkpoints.atomic_file import write_whole
from dense_reward.engines.torch.device import chosen_device
from dense_reward.records import Report

from dense_reward_trainer.configs.credit import CreditConfig
from dense_reward_trainer.credit.answer_ranking import rank
from dense_reward_trainer.credit.error_localisation import Localisation, localise
from dense_reward_trainer.credit.example import Example, plot_example
from dense_reward_trainer.credit.first_wrong_step import first_wrong_steps
from dense_reward_trainer.credit.judged_answers import JudgedAnswers, Rankings
from dense_reward_trainer.credit.plot import plot_credit
from dense_reward_trainer.credit.references import References
from dense_reward_trainer.credit.table import localisation_lines, ranking_lines, reference_lines
from dense_reward_trainer.credit.verdict import Verdict, verdict
from dense_reward_trainer.data.corruption import Corrupter, ErrorKind
from dense_reward_trainer.data.process_labels import Solution, read_solutions
from dense_reward_trainer.data.sources import Demonstration, load
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.rl.policy import PolicyCheckpoint, load_policy
from dense_reward_trainer.rl.reward_service import ServiceAddress, pinned_pairs
from dense_reward_trainer.rl.sampling import Sampling
from dense_reward_trainer.runs.run_folder import check_run, open_run


@dataclass(frozen=True, slots=True)
class CreditResult:
    """Figures by column (see credit/references.py), with 95 % bootstrap intervals.

    `references`: the reference checkpoint of each pair. `left_out`: columns that the engine cannot compute.
    `localisation`: also by kind of planted error. `planted_ranking`: right answers against the same ones with an error,
    by kind, column and aggregate. `ranking`: right against wrong samples, by column and aggregate. It and `verdict` are
    null without a policy to sample from, and if its samples are all right or all wrong (`not_ranked` says so). `steps`
    is null without labelled solutions.
    """

    references: dict[str, str]
    left_out: tuple[str, ...]
    localisation: dict[str, dict[str, Localisation]]
    planted_ranking: dict[str, Rankings]
    answers: int
    ranking: Rankings | None
    verdict: Verdict | None
    right: int
    wrong: int
    not_ranked: str | None
    steps: dict[str, Localisation] | None
    solutions: int


def run(config: CreditConfig, report: Report) -> CreditResult:
    """Measures, reports a table, and writes credit.json, credit.png and an example of each kind of error.

    Samples that are all right or all wrong are reported as soon as they are judged; the other figures are kept. Raises
    ConfigError if too few answers can hold an error; also DataError, CheckpointError or JobError. The message states
    the cure.
    """
    check_run("credit", config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    loaded = load(config.data)
    report(loaded.summary)
    demonstrations = loaded.demonstrations
    solutions = () if config.solutions is None else _with_an_error(read_solutions(config.solutions))
    policy = _policy(config)
    with pinned_pairs(ServiceAddress.of(config.service_url, config), config.pair_names, report) as pairs:
        references = References(pairs)
        planted = {kind: _planted(kind, references, demonstrations, config) for kind in config.corruptions}
        judged = None
        if policy is not None:
            sampling = Sampling(config.max_new_tokens, batch_size=256)
            judged = rank(
                references,
                policy,
                demonstrations,
                sampling,
                samples=config.samples,
                window=config.window_tokens,
                seed=config.seed,
                report=report,
            )
        steps = first_wrong_steps(references, solutions, config.seed) if solutions else None
    not_ranked = None if judged is None else judged.not_ranked
    ranking = None if judged is None or not_ranked is not None else judged.ranking(config.seed)
    right, wrong = (0, 0) if judged is None else judged.counts
    result = CreditResult(
        references=references.names,
        left_out=references.left_out,
        localisation={kind: found for kind, (found, _, _) in planted.items()},
        planted_ranking={kind: answers.ranking(config.seed) for kind, (_, answers, _) in planted.items()},
        answers=config.answers,
        ranking=ranking,
        verdict=None
        if judged is None or ranking is None or not references.has_controls
        else verdict(judged, ranking, config.seed),
        right=right,
        wrong=wrong,
        not_ranked=not_ranked,
        steps=steps,
        solutions=len(solutions),
    )
    report(credit_table(result, config))
    _save(result, references, config, {kind: example for kind, (_, _, example) in planted.items()})
    return result


def _planted(
    kind: ErrorKind, references: References, demonstrations: Sequence[Demonstration], config: CreditConfig
) -> tuple[dict[str, Localisation], JudgedAnswers, Example]:
    corrupter = Corrupter.of(kind, [demonstration.response for demonstration in demonstrations])
    return localise(
        references,
        demonstrations,
        corrupter,
        count=config.answers,
        against=config.against,
        window=config.window_tokens,
        seed=config.seed,
    )


def _save(
    result: CreditResult, references: References, config: CreditConfig, examples: Mapping[ErrorKind, Example]
) -> None:
    folder = open_run("credit", config).folder
    models = [pair.card.model_dump() for pair in references.pairs]
    record = {"result": asdict(result), "config": config.model_dump(mode="json"), "models": models}
    write_whole(folder / "credit.json", json.dumps(record, indent=2).encode() + b"\n")
    plot_credit(result.localisation, result.ranking, result.verdict, result.steps, folder / "credit.png")
    for kind, example in examples.items():
        plot_example(example, folder / f"example_{kind}")


def _policy(config: CreditConfig) -> PolicyCheckpoint | None:
    if config.policy is None:
        return None
    return load_policy(config.policy, precision="float32", device=chosen_device(config.device))


def credit_table(result: CreditResult, config: CreditConfig) -> str:
    """The result as text: a line for each column, and the verdict at the end."""
    return "\n".join(_lines(result, config))


def _lines(result: CreditResult, config: CreditConfig) -> Iterator[str]:
    yield from reference_lines(result.references, result.left_out)
    others = config.against.replace("_", " ")
    for kind, by_column in result.localisation.items():
        title = f"corrupted {kind} against the other {others} of its answer, {result.answers} answers"
        yield from localisation_lines(title, by_column)
    for kind, found in result.planted_ranking.items():
        yield from ranking_lines(f"right answers against those with a corrupted {kind}", found, config.window_tokens)
    if result.steps is not None:
        title = f"first wrong step against those before it, {result.solutions} solutions"
        yield from localisation_lines(title, result.steps)
    if result.ranking is not None:
        title = f"{result.right} right against {result.wrong} wrong samples"
        yield from ranking_lines(title, result.ranking, config.window_tokens)
    if result.not_ranked is not None:
        yield result.not_ranked
    if result.verdict is not None:
        yield from result.verdict.words
    elif result.ranking is not None:
        yield "no verdict: a token head has no SFT model to be compared with; serve a pair next to it (--pairs-file)"


def _with_an_error(solutions: list[Solution]) -> tuple[Solution, ...]:
    """The solutions that have right steps before their first wrong one. Raises ConfigError if there are none."""
    comparable = tuple(solution for solution in solutions if solution.first_wrong)
    if not comparable:
        raise ConfigError(
            f"solutions: none of {len(solutions)} has right steps before a wrong one: give another file, or set null"
        )
    return comparable
