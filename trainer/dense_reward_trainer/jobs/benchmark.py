"""The `benchmark` job: process-reward benchmarks, their responses scored through the service, by their own metrics.

Every response is scored once under all references and kept, so a stopped job continues, and another seed is free. The
tables have a row for each column and way to judge, beside the best one of the SFT model alone.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dense_reward.checkpoints.atomic_file import write_whole
from dense_reward.records import Report

from dense_reward_trainer.benchmarks.judgements import prm_bench_lines, reward_bench_2_lines, step_lines
from dense_reward_trainer.benchmarks.prm_bench import JudgedSteps, read_prm_bench
from dense_reward_trainer.benchmarks.reward_bench_2 import Choice, read_reward_bench_2
from dense_reward_trainer.benchmarks.scored import ResponseScores, StepScores, score_responses, score_steps
from dense_reward_trainer.benchmarks.tables import Table, first_error_tables, prm_bench_table, reward_bench_2_table
from dense_reward_trainer.configs.benchmark import BenchmarkConfig
from dense_reward_trainer.credit.auroc import Interval
from dense_reward_trainer.credit.references import References
from dense_reward_trainer.credit.table import reference_lines
from dense_reward_trainer.data.process_labels import Solution, read_solutions
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.rl.reward_service import ServiceAddress, pinned_pairs
from dense_reward_trainer.runs.kept_parts import KeptParts
from dense_reward_trainer.runs.next_step import finished, report_page
from dense_reward_trainer.runs.run_folder import check_run, open_run
from dense_reward_trainer.text_table import aligned


@dataclass(frozen=True, slots=True)
class Files:
    """The rows of all files of a configuration."""

    first_errors: dict[str, list[Solution]]
    prm_bench: list[JudgedSteps]
    reward_bench_2: list[Choice]


@dataclass(frozen=True, slots=True)
class Scores:
    """What the service said of them; null for a benchmark that is not measured."""

    first_errors: dict[str, StepScores]
    prm_bench: StepScores | None
    reward_bench_2: ResponseScores | None


def run(config: BenchmarkConfig, report: Report) -> None:
    """Writes benchmark.json and the judgements of every response, and reports the tables.

    Raises ConfigError or DataError before the first request if a file cannot be used, JobError if the service cannot
    score; the message states the cure.
    """
    check_run("benchmark", config)
    files = read_files(config, report)
    with pinned_pairs(ServiceAddress.of(config.service_url, config), config.pair_names, report) as pairs:
        references = References(pairs)
        served = ", ".join(f"{pair.card.name} {pair.card.revision}" for pair in pairs)
        parts = KeptParts(config.output_dir / "parts", report, {"the pairs of the service": served})
        scores = score_files(config, files, references, parts)
    tables = tables_of(config, files, scores)
    for line in (*reference_lines(references.names, references.left_out), *table_lines(tables)):
        report(line)
    folder = open_run("benchmark", config).folder
    write_judgements(folder, files, scores)
    models = [pair.card.model_dump() for pair in pairs]
    record = {
        "tables": [asdict(table) for table in tables],
        "references": references.names,
        "left_out": references.left_out,
        "models": models,
    }
    # nan, such as the score of Ties without both kinds of rows, is no JSON
    record = json.loads(json.dumps(record), parse_constant=lambda _: None)
    write_whole(folder / "benchmark.json", json.dumps(record, indent=2, allow_nan=False).encode() + b"\n")
    report(finished(folder / "benchmark.json", report_page(folder)))


def read_files(config: BenchmarkConfig, report: Report) -> Files:
    """Reads all files. Raises DataError, or ConfigError if a split lacks right solutions or ones with an error."""
    found = Files(
        {
            name: read_solutions(path, config.step_separator, report)[: config.limit]
            for name, path in config.first_errors.items()
        },
        [] if config.prm_bench is None else read_prm_bench(config.prm_bench, config.step_separator)[: config.limit],
        [] if config.reward_bench_2 is None else read_reward_bench_2(config.reward_bench_2)[: config.limit],
    )
    for name, solutions in found.first_errors.items():
        wrong = sum(one.first_wrong is not None for one in solutions)
        report(f"{name}: {len(solutions)} solutions, {wrong} with an error")
        if wrong in {0, len(solutions)}:
            raise ConfigError(
                f"first_errors.{name}: {wrong} of {len(solutions)} solutions have an error, but F1 needs right ones "
                "and ones with an error: raise limit, or give another file"
            )
    return found


def score_files(config: BenchmarkConfig, files: Files, references: References, parts: KeptParts) -> Scores:
    """Scores all responses, or takes what an earlier start has kept of the same responses and pairs."""

    def steps(name: str, solutions: Sequence[Solution]) -> StepScores:
        inputs = _inputs([(one.problem, one.text, one.spans) for one in solutions])
        return parts.get(name, StepScores, lambda: score_steps(references, solutions, f"solutions, {name}"), inputs)

    def responses(choices: Sequence[Choice]) -> ResponseScores:
        asked = [(one.prompt, one.responses) for one in choices]
        inputs = {**_inputs(asked), "window_tokens": str(config.window_tokens)}
        title = "responses of RewardBench 2"
        return parts.get(
            "reward_bench_2",
            ResponseScores,
            lambda: score_responses(references, asked, config.window_tokens, title),
            inputs,
        )

    return Scores(
        {name: steps(f"first_errors_{name}", solutions) for name, solutions in files.first_errors.items()},
        steps("prm_bench", [one.solution for one in files.prm_bench]) if files.prm_bench else None,
        responses(files.reward_bench_2) if files.reward_bench_2 else None,
    )


def _inputs(responses: object) -> dict[str, str]:
    return {"the responses": hashlib.sha256(json.dumps(responses).encode()).hexdigest()}


def tables_of(config: BenchmarkConfig, files: Files, scores: Scores) -> list[Table]:
    """The tables of all benchmarks that are measured."""
    tables = []
    if files.first_errors:
        splits = {name: (solutions, scores.first_errors[name]) for name, solutions in files.first_errors.items()}
        tables += first_error_tables(splits, config.threshold_split, config.seed)
    if scores.prm_bench is not None:
        tables.append(prm_bench_table(files.prm_bench, scores.prm_bench, config.seed))
    if scores.reward_bench_2 is not None:
        tables.append(reward_bench_2_table(files.reward_bench_2, scores.reward_bench_2, config.seed))
    return tables


def write_judgements(folder: Path, files: Files, scores: Scores) -> None:
    """A file for each benchmark with what was computed of every response."""
    contents: dict[str, Iterator[Mapping[str, object]]] = {
        f"steps-{name}": step_lines(solutions, scores.first_errors[name])
        for name, solutions in files.first_errors.items()
    }
    if scores.prm_bench is not None:
        contents["steps-prm_bench"] = prm_bench_lines(files.prm_bench, scores.prm_bench)
    if scores.reward_bench_2 is not None:
        contents["scores-reward_bench_2"] = reward_bench_2_lines(files.reward_bench_2, scores.reward_bench_2)
    for name, lines in contents.items():
        write_whole(folder / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())


def table_lines(tables: Sequence[Table]) -> Iterator[str]:
    """Each table as text: a line for each method, and the control below."""
    for table in tables:
        left_out = f", {table.too_long} too long for the service" if table.too_long else ""
        yield f"{table.name}: {table.metric} of {table.count} rows{left_out}, {table.judged_by}"
        titles = list(dict.fromkeys(title for row in table.rows for title in row.parts))
        rows = [["", table.metric, "against the control", *titles]]
        rows += [
            [
                str(row.method),
                _cell(row.metric),
                "" if row.against_control is None else _cell(row.against_control, "+.3f"),
                *(f"{row.parts[title]:.3f}" for title in titles),
            ]
            for row in table.rows
        ]
        yield aligned(rows)
        if table.control is not None:
            yield f"the control is the best row of the SFT model alone: {table.control}"


def _cell(found: Interval, form: str = ".3f") -> str:
    return f"{found.value:{form}} [{found.low:{form}}, {found.high:{form}}]"
