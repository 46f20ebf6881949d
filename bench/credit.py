"""Credit assignment of the reward over several seeds: `python -m bench.credit arithmetic`, or `... gsm8k FILE`.

Trains once per seed with the shipped recipe, serves the SFT model with all references of the run, runs the credit job
on them, prints the medians over the seeds and writes bench/results/credit_NAME.json. A finished training run is reused:
the commits of each seed are recorded, and a run of another commit is reported.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from dense_reward_trainer.runs.local_service import free_port, serving_run
from dense_reward_trainer.runs.run_folder import RECORD_NAME, RunRecord, commit

from bench.circumstances import circumstances

ROOT = Path(__file__).parent.parent
SAMPLES = "samples"
Measured = Mapping[str, Mapping[str, float]]  # dataclasses.asdict of a Localisation or a Ranking
Ranked = Mapping[str, Mapping[str, Measured]]  # by column and aggregate


class CreditJson(TypedDict):
    """Fields of a credit job's result that are read, named by dataclasses.asdict."""

    localisation: dict[str, Mapping[str, Measured]]
    planted_ranking: dict[str, Ranked]
    ranking: Ranked | None
    commits: dict[str, str | None]


class Medians(TypedDict):
    """Medians of AUROC over the seeds. `localisation`: by kind of error and column. `ranking`: by kind of error, or
    `samples`; by column; by aggregate.
    """

    localisation: dict[str, dict[str, float]]
    ranking: dict[str, dict[str, dict[str, float]]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns exit code 0 once all seeds are measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.credit", description=__doc__)
    parser.add_argument("task", choices=["arithmetic", "gsm8k"])
    parser.add_argument("data", nargs="?", help="only for gsm8k: the training file, or the name of a data set")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="default: 0 1 2, for gsm8k 0")
    options = parser.parse_args(arguments)
    if (options.task == "gsm8k") != (options.data is not None):
        parser.error("gsm8k needs DATA, its training file; arithmetic makes its own and takes none")
    seeds = options.seeds or ([0, 1, 2] if options.task == "arithmetic" else [0])
    results = {seed: measure(options.task, options.data, seed) for seed in seeds}
    found = medians([*results.values()])
    record = {"task": options.task, "medians": found, "seeds": results, **circumstances()}
    target = ROOT / "bench" / "results" / f"credit_{options.task}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(record, indent=2) + "\n")
    print(f"median of {len(seeds)} training seeds:", json.dumps(found, indent=2), f"wrote {target}", sep="\n")
    return 0


def measure(task: str, data: str | None, seed: int) -> CreditJson:
    """Trains one seed and measures it with all references of its run. Returns the credit job's result."""
    run, credit = Path(f"runs/bench/{task}_{seed}"), Path(f"runs/bench/{task}_{seed}_credit")
    train = [f"seed={seed}", f"output_dir={run}"]
    measured = [f"seed={seed}", f"output_dir={credit}"]
    if data is None:
        train += [f"data.arithmetic.seed={seed}"]
        measured += [f"data.source={run}/held_out.jsonl", f"policy={run}/checkpoints/sft"]
    else:
        train += [f"data.source={data}"]
        measured += [f"data.source={data}"]
    job("sft", f"{task}_sft", train)
    with serving_run(run, free_port()) as (_, url):
        job("credit", f"{task}_credit", [*measured, f"service_url={url}"])
    result: CreditJson = json.loads((credit / "credit.json").read_text())["result"]
    result["commits"] = {"sft": commit_of(run), "credit": commit_of(credit)}
    return result


def commit_of(run: Path) -> str | None:
    """Returns the commit at which a run was last started. Prints a line if it is not the present one."""
    done = RunRecord.model_validate_json((run / RECORD_NAME).read_bytes()).commit
    if done != commit():
        print(f"{run} was made at commit {done}; the present commit is {commit()}")
    return done


def job(name: str, recipe: str, overrides: Sequence[str]) -> None:
    subprocess.run([sys.executable, "-m", "dense_reward_trainer.cli", name, recipe, *overrides], check=True)


def medians(results: Sequence[CreditJson]) -> Medians:
    """Median over seeds of each AUROC."""
    first = results[0]
    located = [result["localisation"] for result in results]
    ranked = [
        result["planted_ranking"] | ({} if result["ranking"] is None else {SAMPLES: result["ranking"]})
        for result in results
    ]
    return {
        "localisation": {
            kind: {column: median([one[kind][column] for one in located]) for column in found}
            for kind, found in first["localisation"].items()
        },
        "ranking": {
            group: {
                column: {name: median([one[group][column][name] for one in ranked]) for name in by_aggregate}
                for column, by_aggregate in found.items()
            }
            for group, found in ranked[0].items()
        },
    }


def median(measured: Sequence[Measured]) -> float:
    return statistics.median(one["auroc"]["value"] for one in measured)


if __name__ == "__main__":
    sys.exit(main())
