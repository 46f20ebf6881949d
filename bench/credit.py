"""Credit assignment of the reward over several seeds: `python -m bench.credit arithmetic`, or `... gsm8k FILE`.

Trains once per seed with the shipped recipe, serves the SFT model with each milestone of the run as reference, runs the
credit job on each pair, prints the medians over the seeds and writes bench/results/credit_NAME.json. A finished
training run is reused: the commits of each seed are recorded, and a run of another commit is reported.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from dense_reward_trainer.runs.local_service import free_port, serving
from dense_reward_trainer.runs.run_folder import RECORD_NAME, RunRecord, commit

from bench.circumstances import circumstances

ROOT = Path(__file__).parent.parent
REFERENCES = ("reference", "early")  # milestones of the recipes: after half and a tenth of the samples
Signals = dict[str, dict[str, dict[str, float]]]


class CreditJson(TypedDict):
    """Fields of a credit job's result that are read: AUROCs by signal, named by dataclasses.asdict."""

    localisation: dict[str, Signals]
    ranking: Signals | None
    commits: dict[str, str | None]


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
    medians = {name: median_table([found[name] for found in results.values()]) for name in REFERENCES}
    record = {"task": options.task, "medians": medians, "seeds": results, **circumstances()}
    target = ROOT / "bench" / "results" / f"credit_{options.task}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(record, indent=2) + "\n")
    print(f"median of {len(seeds)} training seeds:", json.dumps(medians, indent=2), f"wrote {target}", sep="\n")
    return 0


def measure(task: str, data: str | None, seed: int) -> dict[str, CreditJson]:
    """Trains one seed and measures it with each of its references. Returns the credit jobs' results by reference."""
    run = Path(f"runs/bench/{task}_{seed}")
    train = [f"seed={seed}", f"output_dir={run}"]
    found = [f"seed={seed}"]
    if data is None:
        train += [f"data.arithmetic.seed={seed}"]
        found += [f"data.source={run}/held_out.jsonl", f"policy={run}/checkpoints/sft"]
    else:
        train += [f"data.source={data}"]
        found += [f"data.source={data}"]
    job("sft", f"{task}_sft", train)
    results: dict[str, CreditJson] = {}
    for reference in REFERENCES:
        credit = Path(f"runs/bench/{task}_{seed}_credit_{reference}")
        with serving(run / "checkpoints" / "sft", run / "checkpoints" / reference, free_port()) as (_, url):
            job("credit", f"{task}_credit", [*found, f"output_dir={credit}", f"service_url={url}"])
        result: CreditJson = json.loads((credit / "credit.json").read_text())["result"]
        result["commits"] = {"sft": commit_of(run), "credit": commit_of(credit)}
        results[reference] = result
    return results


def commit_of(run: Path) -> str | None:
    """Returns the commit at which a run was last started. Prints a line if it is not the present one."""
    done = RunRecord.model_validate_json((run / RECORD_NAME).read_bytes()).commit
    if done != commit():
        print(f"{run} was made at commit {done}; the present commit is {commit()}")
    return done


def job(name: str, recipe: str, overrides: Sequence[str]) -> None:
    subprocess.run([sys.executable, "-m", "dense_reward_trainer.cli", name, recipe, *overrides], check=True)


def median_table(results: Sequence[CreditJson]) -> dict[str, dict[str, float]]:
    """Median over seeds of each AUROC, by task: a kind of corruption, or ranking."""
    groups: dict[str, list[Signals]] = {}
    for result in results:
        for kind, found in result["localisation"].items():
            groups.setdefault(f"corrupted {kind}", []).append(found)
        if result["ranking"] is not None:
            groups.setdefault("ranking", []).append(result["ranking"])
    return {
        group: {name: statistics.median(one[name]["auroc"]["value"] for one in found) for name in found[0]}
        for group, found in groups.items()
    }


if __name__ == "__main__":
    sys.exit(main())
