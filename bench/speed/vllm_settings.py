"""Which of vLLM's settings is the fastest here, on (a) at 40M: `python -m bench.speed.vllm_settings [DIR of vLLM]`.

What the benchmark runs it with (Stage.vllm, worker_vllm) is chosen by this. Measures in turns, like the benchmark.
"""

import statistics
import sys
from contextlib import ExitStack
from pathlib import Path

from bench.speed.cells import cells_of
from bench.speed.processes import Worker
from bench.speed.stage import Stage
from bench.speed.workloads import write

ROUNDS = 6  # the first is not counted
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
ITS_OWN_THREADS = {"VLLM_CPU_OMP_THREADS_BIND": "auto"}
ITS_OWN_OPENMP = {"LD_PRELOAD": ""}


def main() -> None:
    stage = Stage("cpu", "float32", 0, Path(sys.argv[1] if len(sys.argv) > 1 else ".venv-vllm"))
    models = stage.pair("40m")
    with ExitStack() as stack:

        def started(*flags: str, **environment: str) -> Worker:
            return stack.enter_context(stage.vllm(models, "sft", *flags, **environment))

        workers = {
            "as in the benchmark": started(),
            "compiled": started("--compiled"),
            "in one process": started(**IN_PROCESS),
            "its own choice of cores": started(**ITS_OWN_THREADS),
            "its own choice of OpenMP": started(**ITS_OWN_OPENMP),
        }
        for name, seconds in measured(stage, workers).items():
            print(f"{name}: median {statistics.median(seconds[1:]):.2f} s, least {min(seconds[1:]):.2f} s")


def measured(stage: Stage, workers: dict[str, Worker]) -> dict[str, list[float]]:
    """Seconds of every round, one checkpoint."""
    cell = next(cell for cell in cells_of("cpu") if cell.name == "a_40m")
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for round_ in range(ROUNDS):
        file = write(cell.workload(round_), stage.folder / "workload.json")
        for name, worker in workers.items():
            with worker.awake():
                answer = worker.ask({"workload": str(file), "out": str(stage.out), "method": "", "batch": 0})
            seconds[name].append(sum(answer["latencies_s"]))
        print(f"round {round_}: { {name: round(found[-1], 2) for name, found in seconds.items()} }", flush=True)
    return seconds


if __name__ == "__main__":
    main()
