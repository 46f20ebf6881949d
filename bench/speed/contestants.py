"""Contestants: the launcher that starts their processes, the service, and all contestants of one model shape."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

import httpx2
import numpy as np
from dense_reward import Client, ScoreOptions
from dense_reward.client.results import Scored
from dense_reward_trainer.runs.local_service import HOST, free_port

from bench.speed import processes
from bench.speed.processes import ContestantError, Facts, Group, Logprobs, NotMeasuredError, Question, Worker
from bench.speed.workload import SHAPES, Item, Workload, draw, same_lengths, write

Other = Literal["transformers", "transformers_best", "vllm"]
BATCHES = (8, 32)
MEMORY_TIMES_WEIGHTS = 16
"""All contestants stay loaded if memory exceeds this many times the pair's files: four of them load the files, and
computing needs more."""
QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TQDM_DISABLE": "1", "VLLM_NO_USAGE_STATS": "1"}
LONG_S = 3600.0
READY_POLL_S = 0.2
LOGPROBS = ScoreOptions(include=("sft_logprob", "reference_logprob"))


@dataclass(frozen=True, slots=True, eq=False)
class ServiceRun:
    """Seconds of each request, the service's own `compute_s` over all requests, and the reward of each token."""

    latencies_s: list[float]
    compute_s: float
    rewards_N: Logprobs


class Service(Group):
    """The real `dense-reward serve`, called by the project's client. All others are compared with it.

    Ready to score, and not paused, once constructed. Raises ContestantError if it cannot start.
    """

    def __init__(self, models: Path, *, dtype: str, device: str, threads: int, log: Path) -> None:
        self._port = free_port()
        pair = ("--sft", str(models / "sft"), "--reference", str(models / "reference"))
        options = ("--dtype", dtype, "--device", device, "--threads", str(threads), "--port", str(self._port))
        command = [sys.executable, "-m", "dense_reward.cli", "serve", *pair, *options, "--log-level", "warning"]
        super().__init__(command, log=log, environment={"TQDM_DISABLE": "1"})
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise

    def client(self) -> Client:
        """Returns a client that does not retry: a failure must be visible."""
        return Client(f"http://{HOST}:{self._port}", timeout_s=LONG_S, retry_for_s=0)

    def run(self, workload: Workload) -> ServiceRun:
        """Scores as a job does: with default options, which return the reward."""
        latencies_s, answers = [], []
        with self.client() as client:
            for items in workload.requests:
                started_s = time.perf_counter()
                answers.append(_score(client, items, ScoreOptions()))
                latencies_s.append(time.perf_counter() - started_s)
        compute_s = sum(answer.timing.compute_s for answer in answers)
        return ServiceRun(latencies_s, compute_s, _concatenated(answers, "reward"))

    def logprobs(self, workload: Workload) -> Logprobs:
        """[2, N], sft before reference."""
        with self.client() as client:
            answers = [_score(client, items, LOGPROBS) for items in workload.requests]
        return np.stack([_concatenated(answers, name) for name in ("sft_logprob", "reference_logprob")])

    def metric(self, name: str) -> float:
        """The value of a metric that has no labels."""
        text = httpx2.get(f"http://{HOST}:{self._port}/metrics", timeout=LONG_S, trust_env=False).text
        return float(next(line.split()[1] for line in text.splitlines() if line.startswith(f"{name} ")))

    def _wait_until_ready(self) -> None:
        deadline_s = time.monotonic() + LONG_S
        with self.client() as client:
            while not client.ready():
                if self.process.poll() is not None or time.monotonic() > deadline_s:
                    raise ContestantError(f"the service did not become ready: {self.last_error()}")
                time.sleep(READY_POLL_S)


def _score(client: Client, items: Sequence[Item], options: ScoreOptions) -> Scored:
    if len(items) == 1:
        return client.score_ids(items[0].prompt_ids, items[0].response_ids, options=options)
    return client.score_items(
        [{"prompt_ids": item.prompt_ids, "response_ids": item.response_ids} for item in items], options=options
    )


def _concatenated(answers: Sequence[Scored], name: str) -> Logprobs:
    return np.concatenate([getattr(result, name) for answer in answers for result in answer.results])


@dataclass(frozen=True, slots=True)
class Launcher:
    """Starts contestants on a device, with a dtype and a number of threads.

    Paths are relative to the repository's root, from which the benchmark runs.
    """

    device: str
    dtype: str
    threads: int
    vllm_folder: Path
    folder: Path = Path("runs/bench/speed")
    models: Path = Path("runs/bench/models")

    @property
    def out(self) -> Path:
        """File to which workers write log-probs."""
        return self.folder / "logprobs.npy"

    def in_dtype(self, dtype: str) -> "Launcher":
        return replace(self, dtype=dtype)

    def pair(self, shape_name: str) -> Path:
        """Returns the folder of a shape's two checkpoints. Makes those that are missing."""
        folder = self.models / shape_name
        command = [sys.executable, "-m", "bench.speed.inputs", shape_name, str(folder)]
        subprocess.run(command, check=True, env={**os.environ, **QUIET})
        return folder

    def service(self, models: Path) -> Service:
        log = self.folder / "logs" / "service.log"
        return Service(models, dtype=self.dtype, device=self.device, threads=self.threads, log=log)

    def peak(self) -> Worker:
        return self._worker("peak", "--dtype", self.dtype, "--threads", str(self.threads))

    def transformers(self, models: Path, dtype: str) -> Worker:
        pair = ("--sft", str(models / "sft"), "--reference", str(models / "reference"))
        return self._worker("transformers", *pair, "--dtype", dtype, "--threads", str(self.threads))

    def vllm(self, models: Path, role: str, *flags: str, **changes: str) -> Worker:
        """Raises NotMeasuredError if vLLM is not installed, with the reason that its installation reported."""
        if not (self.vllm_folder / "bin" / "vllm").exists():
            raise NotMeasuredError(_why_missing(self.vllm_folder))
        environment = {"VLLM_LOGGING_LEVEL": "WARNING", **(self.vllm_on_cpu() if self.device == "cpu" else {})}
        arguments = ("--folder", str(models / role), "--dtype", self.dtype, *flags)
        python = str(self.vllm_folder / "bin" / "python")
        return self._worker("vllm", *arguments, log=f"vllm_{role}", python=python, **(environment | changes))

    def vllm_on_cpu(self) -> dict[str, str]:
        """Environment of vLLM on a CPU.

        It sets all cores (vLLM's default leaves one out), Intel's OpenMP, which vLLM recommends, and 1 GiB for keys and
        values.
        """
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": cores}
        openmp = self.vllm_folder / "lib" / "libiomp5.so"
        return environment | ({"LD_PRELOAD": str(openmp.resolve())} if openmp.exists() else {})

    def _worker(
        self, name: str, *arguments: str, log: str | None = None, python: str = sys.executable, **environment: str
    ) -> Worker:
        command = [python, "-m", f"bench.speed.worker_{name}", *arguments, "--device", self.device]
        return Worker(command, log=self.folder / "logs" / f"{log or name}.log", environment=QUIET | environment)


def _why_missing(folder: Path) -> str:
    log = folder / "install.log"
    if not log.exists():
        return "vLLM is not installed: `make bench` and `make bench-gpu` do it"
    lines = [line for line in log.read_text(errors="replace").splitlines() if "ERROR" in line]
    return f"vLLM could not be installed: {lines[-1] if lines else 'see install.log'}"


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to measure a contestant. Batch 0: the contestant makes its own batches."""

    contestant: Other
    batch: int = 0

    @property
    def name(self) -> str:
        return f"{self.contestant}_{self.batch}" if self.batch else self.contestant


def variants(sequences: int) -> list[Variant]:
    """Returns the variants of all other contestants. Omits a batch size if a smaller one fits all sequences."""
    sizes = [batch for batch in BATCHES if batch == BATCHES[0] or sequences > BATCHES[0]]
    padded: tuple[Other, ...] = ("transformers", "transformers_best")
    return [*(Variant(contestant, batch) for contestant in padded for batch in sizes), Variant("vllm")]


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Seconds of each request, and the rewards of all response tokens."""

    latencies_s: list[float]
    rewards_N: Logprobs


class Contestants:
    """All contestants of one shape, each started on first use. A context manager that ends all of their processes."""

    def __init__(self, launcher: Launcher, shape_name: str) -> None:
        self.launcher = launcher
        self.models = launcher.pair(shape_name)
        self._vocab_size = SHAPES[shape_name].vocab_size
        self._stack = ExitStack()
        self._vllm_missing: NotMeasuredError | None = None
        self.facts: dict[str, Facts] = {}  # as reported by each worker
        self.warmed: set[str] = set()
        self._workers: dict[str, Worker] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @cached_property
    def service(self) -> Service:
        return self._stack.enter_context(self.launcher.service(self.models))

    @cached_property
    def held_mb(self) -> float:
        """Memory that the service holds after one small request."""
        with self.service.awake():
            self.service.run(self._small)
            return processes.held_mb(self.service.process.pid, self.launcher.device)

    def run_service(self, workload: Workload) -> ServiceRun:
        with self.service.awake():
            self.service.run(self._small)
            return self.service.run(workload)

    def peak(self) -> Facts:
        """Returns the speed of the fastest matmul, `flops_per_s`, and its shape."""
        with self._peak.awake():
            return self._peak.ask(_question(self._small_file, self.launcher.out, "peak"))["facts"]

    def run(self, variant: Variant, file: Path) -> Run:
        """Scores the workload in a file. Raises NotMeasuredError, with the reason."""
        if variant.contestant != "vllm":
            method = "best" if variant.contestant == "transformers_best" else "plain"
            with self._loaded("transformers") as worker:
                latencies_s, pair_2N = self._asked(worker, file, method, variant.batch)
            return Run(latencies_s, pair_2N[0] - pair_2N[1])
        (sft_s, sft_1N), (reference_s, reference_1N) = self._ask_vllm(file)
        both_s = [one + other for one, other in zip(sft_s, reference_s, strict=True)]
        return Run(both_s, sft_1N[0] - reference_1N[0])

    def transformers_logprobs(self, dtype: str, file: Path) -> Logprobs:
        """[2, N] in a dtype that can differ from the run's, by a separate worker."""
        with self.launcher.transformers(self.models, dtype) as worker:
            return self._asked(worker, file, "plain", BATCHES[0])[1]

    @cached_property
    def _peak(self) -> Worker:
        worker = self.launcher.peak()
        self.facts["peak"] = worker.facts
        return self._stack.enter_context(worker)

    def _ask_vllm(self, file: Path) -> list[tuple[list[float], Logprobs]]:
        """Answers of each checkpoint. If one fails to start, later calls raise the same error and do not try again."""
        if self._vllm_missing is not None:
            raise self._vllm_missing
        answers = []
        for role in ("sft", "reference"):
            try:
                with self._loaded(f"vllm_{role}") as worker:
                    answers.append(self._asked(worker, file))
            except (ContestantError, NotMeasuredError) as error:
                self._vllm_missing = NotMeasuredError(str(error))
                raise self._vllm_missing from None
        return answers

    @contextmanager
    def _loaded(self, name: str) -> Iterator[Worker]:
        """A worker that stays loaded for the next round; if memory is too small for all, only for this block."""
        if name in self._workers:
            yield self._workers[name]
            return
        worker = self._started(name)
        if self._all_fit:
            self._workers[name] = self._stack.enter_context(worker)
            yield worker
            return
        with worker:
            yield worker

    def _started(self, name: str) -> Worker:
        if name == "transformers":
            worker = self.launcher.transformers(self.models, self.launcher.dtype)
        else:
            worker = self.launcher.vllm(self.models, name.removeprefix("vllm_"))
        self.facts[name.partition("_")[0]] = worker.facts
        return worker

    @cached_property
    def _all_fit(self) -> bool:
        """Whether all contestants fit into memory together."""
        weights = sum(file.stat().st_size for file in self.models.rglob("*.safetensors"))
        return processes.machine_bytes() > MEMORY_TIMES_WEIGHTS * weights

    @cached_property
    def _small(self) -> Workload:
        """The warm-up request before each measurement."""
        return draw("small", same_lengths(1, 2, 128, 128), self._vocab_size, 0)

    @cached_property
    def _small_file(self) -> Path:
        return write(self._small, self.launcher.folder / "small.json")

    def _asked(self, worker: Worker, file: Path, method: str = "", batch: int = 0) -> tuple[list[float], Logprobs]:
        with worker.awake():
            worker.ask(_question(self._small_file, self.launcher.out, method, batch))
            answer = worker.ask(_question(file, self.launcher.out, method, batch))
        return answer["latencies_s"], np.load(self.launcher.out)


def _question(file: Path, out: Path, method: str, batch: int = 0) -> Question:
    return {"workload": str(file), "out": str(out), "method": method, "batch": batch}
