"""The `credit` job: do rewards locate errors planted in right answers, and rank right above wrong samples?

All references of a run are compared in one table, by every signal and aggregate, beside the signals of the SFT model
alone, which the reward must beat. The last lines say which reference to use, or that none helps.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from dense_reward.checkpoints.atomic_file import write_whole
from dense_reward.engines.torch.device import chosen_device
from dense_reward.records import Report

from dense_reward_trainer.configs.credit import CreditConfig
from dense_reward_trainer.configs.dpr import DprConfig
from dense_reward_trainer.configs.preview import PreviewConfig
from dense_reward_trainer.credit.answer_ranking import rank
from dense_reward_trainer.credit.error_localisation import Localisation, localise
from dense_reward_trainer.credit.example import plot_example
from dense_reward_trainer.credit.first_wrong_step import first_wrong_steps
from dense_reward_trainer.credit.judged_answers import JudgedAnswers, Rankings
from dense_reward_trainer.credit.plot import plot_credit
from dense_reward_trainer.credit.references import References
from dense_reward_trainer.credit.table import legend, localisation_lines, ranking_lines, reference_lines
from dense_reward_trainer.credit.verdict import Verdict, verdict
from dense_reward_trainer.data.corruption import Corrupter, ErrorKind
from dense_reward_trainer.data.final_answers import AnswerChecker, is_right, meaning_of_right
from dense_reward_trainer.data.process_labels import Solution, read_solutions
from dense_reward_trainer.data.sources import Demonstration, data_sha256, load
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.preview.labelled import wanted
from dense_reward_trainer.rl.policy import PolicyCheckpoint, load_policy
from dense_reward_trainer.rl.reward_service import PinnedPair, ServiceAddress, pinned_pairs
from dense_reward_trainer.rl.sampling import Sampling
from dense_reward_trainer.runs.kept_parts import KeptParts, file_sha256, inputs_of_config
from dense_reward_trainer.runs.next_step import finished, job, more_in, report_page, sft_run_of
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

    Each part is kept in parts/ as soon as it is measured, so a stopped job continues.
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
    solutions = () if config.solutions is None else _with_an_error(read_solutions(config.solutions, report=report))
    policy = _policy(config)
    known = () if policy is None else _with_known_answer(demonstrations, config.checker)
    with pinned_pairs(ServiceAddress.of(config.service_url, config), config.pair_names, report) as pairs:
        parts = KeptParts(config.output_dir / "parts", report, _inputs(config, demonstrations, policy, pairs))
        references = References(pairs)
        planted = {kind: _planted(kind, references, demonstrations, config, parts) for kind in config.corruptions}
        judged = None if policy is None else _ranked(references, policy, known, config, parts)
        steps = _steps(references, solutions, config, parts) if solutions else None
    result = _result(references, config, planted, judged, (steps, len(solutions)))
    report(credit_table(result, config))
    _save(result, references, config)
    report(finished(config.output_dir / "credit.json", _next_step(config, result)))
    return result


@dataclass(frozen=True, slots=True)
class Planted:
    """What answers with planted errors of one kind show: by column, and as right and wrong answers."""

    localisation: dict[str, Localisation]
    answers: JudgedAnswers


def _inputs(
    config: CreditConfig,
    demonstrations: Sequence[Demonstration],
    policy: PolicyCheckpoint | None,
    pairs: Sequence[PinnedPair],
) -> dict[str, str]:
    """What the figures depend on, by name."""
    files = {} if config.solutions is None else {"the file of solutions": file_sha256(config.solutions)}
    return {
        **inputs_of_config(config),
        **files,
        "the answers": data_sha256(demonstrations),
        "the policy's weights": "" if policy is None else policy.manifest.weights_sha256,
        "the pairs of the service": ", ".join(f"{pair.card.name} {pair.card.revision}" for pair in pairs),
    }


def _planted(
    kind: ErrorKind,
    references: References,
    demonstrations: Sequence[Demonstration],
    config: CreditConfig,
    parts: KeptParts,
) -> Planted:
    """Also draws the first answer, right and with its error."""

    def measure() -> Planted:
        found, answers, example = localise(
            references,
            demonstrations,
            Corrupter.of(kind, [demonstration.response for demonstration in demonstrations]),
            count=config.answers,
            against=config.against,
            window=config.window_tokens,
            seed=config.seed,
        )
        config.output_dir.mkdir(parents=True, exist_ok=True)
        plot_example(example, config.output_dir / f"example_{kind}")
        return Planted(found, answers)

    return parts.get(f"planted_{kind}", Planted, measure)


def _ranked(
    references: References,
    policy: PolicyCheckpoint,
    demonstrations: Sequence[Demonstration],
    config: CreditConfig,
    parts: KeptParts,
) -> JudgedAnswers:
    def judge(demonstration: Demonstration, text: str) -> bool:
        answer = wanted(demonstration, config.checker)
        return answer is not None and is_right(text, answer, config.checker)

    return rank(
        references,
        policy,
        demonstrations,
        Sampling(config.max_new_tokens, batch_size=256),
        samples=config.samples,
        window=config.window_tokens,
        seed=config.seed,
        report=parts.report,
        is_right=judge,
        parts=parts,
    )


def _steps(
    references: References, solutions: Sequence[Solution], config: CreditConfig, parts: KeptParts
) -> dict[str, Localisation]:
    return parts.get("steps", dict[str, Localisation], lambda: first_wrong_steps(references, solutions, config.seed))


def _result(
    references: References,
    config: CreditConfig,
    planted: Mapping[ErrorKind, Planted],
    judged: JudgedAnswers | None,
    steps: tuple[dict[str, Localisation] | None, int],
) -> CreditResult:
    """The figures of all parts. `steps`: those of labelled solutions, and how many of these there are."""
    not_ranked = None if judged is None else judged.not_ranked
    ranking = None if judged is None or not_ranked is not None else judged.ranking(config.seed)
    right, wrong = (0, 0) if judged is None else judged.counts
    return CreditResult(
        references=references.names,
        left_out=references.left_out,
        localisation={kind: one.localisation for kind, one in planted.items()},
        planted_ranking={kind: one.answers.ranking(config.seed) for kind, one in planted.items()},
        answers=config.answers,
        ranking=ranking,
        verdict=None
        if judged is None or ranking is None or not references.has_controls
        else verdict(judged, ranking, config.seed),
        right=right,
        wrong=wrong,
        not_ranked=not_ranked,
        steps=steps[0],
        solutions=steps[1],
    )


def _save(result: CreditResult, references: References, config: CreditConfig) -> None:
    folder = open_run("credit", config).folder
    models = [pair.card.model_dump() for pair in references.pairs]
    record = {"result": asdict(result), "config": config.model_dump(mode="json"), "models": models}
    found = result.localisation, result.ranking, result.verdict, result.steps
    plot_credit(*found, folder / "credit.png", not_ranked=result.not_ranked)
    write_whole(folder / "credit.json", json.dumps(record, indent=2).encode() + b"\n")


def _next_step(config: CreditConfig, result: CreditResult) -> str:
    """Train on the reference that helps; where none does, read why; where nothing was ranked, rank."""
    run = None if config.policy is None else sft_run_of(config.policy)
    if result.verdict is not None and result.verdict.use is not None:
        keys: dict[str, object] = {
            "policy": config.policy,
            "prompts": {"source": "PROMPTS.jsonl"} if run is None else run[1]["data"],
            "held_out": None if run is None else run[0] / "held_out.jsonl",
            "service_url": config.service_url,
            "service_key_file": config.service_key_file,
            "service_pair": result.verdict.use,
            "max_new_tokens": config.max_new_tokens,
            "held_out_options.max_new_tokens": config.max_new_tokens,
            "held_out_options.checker": config.checker,
            "device": config.device,
            "output_dir": more_in(config.output_dir, "dpr"),
        }
        return job("dpr", DprConfig, keys, default="dpr_full", match="policy")
    if result.verdict is not None and result.verdict.references:
        return f"no reference helps, so do not train on one; look at the details: {report_page(config.output_dir)}"
    preview = {
        "run": Path("RUN") if run is None else run[0],
        "labelled": config.data.source,
        "checker": config.checker,
        "max_new_tokens": config.max_new_tokens,
        "device": config.device,
        "output_dir": more_in(config.output_dir, "preview"),
    }
    command = job("preview", PreviewConfig, preview, default="preview_full", match="run")
    return f"would training on it help? {command}"


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
        yield meaning_of_right(config.checker)
    yield legend()
    if result.not_ranked is not None:
        yield result.not_ranked
    if result.verdict is not None:
        yield from result.verdict.words
    elif result.ranking is not None:
        yield "no verdict: a token head has no SFT model to be compared with; serve a pair next to it (--pairs-file)"


def _with_known_answer(demonstrations: Sequence[Demonstration], checker: AnswerChecker) -> tuple[Demonstration, ...]:
    """The demonstrations whose right answer the checker knows. Raises ConfigError if there are none."""
    known = tuple(one for one in demonstrations if wanted(one, checker) is not None)
    if not known:
        raise ConfigError(
            f"policy: no row states its answer (checker {checker}), so samples cannot be judged: add final_answer to "
            "the rows, set another checker, or set policy=null and give judged answers to the job preview"
        )
    return known


def _with_an_error(solutions: list[Solution]) -> tuple[Solution, ...]:
    """The solutions that have right steps before their first wrong one. Raises ConfigError if there are none."""
    comparable = tuple(solution for solution in solutions if solution.first_wrong)
    if not comparable:
        raise ConfigError(
            f"solutions: none of {len(solutions)} has right steps before a wrong one: give another file, or set null"
        )
    return comparable
