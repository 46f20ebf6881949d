"""Everyone who is measured on one shape: started when first needed, stopped while others run, ended together."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

import numpy as np

from bench.speed import memory
from bench.speed.processes import ContestantError, NotMeasuredError, Worker
from bench.speed.protocol import Facts, Logprobs, Question
from bench.speed.service import Service, ServiceRun
from bench.speed.shapes import SHAPES
from bench.speed.stage import Stage
from bench.speed.workloads import Workload, draw, same_lengths, write

Other = Literal["transformers", "transformers_best", "vllm"]
BATCHES = (8, 32)
ROOM = 16
"""Times the weights on disk that everybody needs beside each other: four hold them, and more while they compute."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to measure a contestant; batch 0: it batches by itself."""

    contestant: Other
    batch: int = 0

    @property
    def name(self) -> str:
        return f"{self.contestant}_{self.batch}" if self.batch else self.contestant


def variants(sequences: int) -> list[Variant]:
    """Of all other contestants; a batch that is no fuller than a smaller one is left out."""
    sizes = [batch for batch in BATCHES if batch == BATCHES[0] or sequences > BATCHES[0]]
    padded: tuple[Other, ...] = ("transformers", "transformers_best")
    return [*(Variant(contestant, batch) for contestant in padded for batch in sizes), Variant("vllm")]


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Seconds of each request, and the rewards of all of its responses' tokens."""

    latencies_s: list[float]
    rewards_N: Logprobs


class Field:
    """A context manager; all of its processes end with it."""

    def __init__(self, stage: Stage, shape_name: str) -> None:
        self.stage = stage
        self.models = stage.pair(shape_name)
        self._vocabulary = SHAPES[shape_name].vocabulary
        self._stack = ExitStack()
        self._vllm_missing: NotMeasuredError | None = None
        self.facts: dict[str, Facts] = {}  # what workers say of themselves
        self.warmed: set[str] = set()
        self._workers: dict[str, Worker] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @cached_property
    def service(self) -> Service:
        return self._stack.enter_context(self.stage.service(self.models))

    @cached_property
    def held_mb(self) -> float:
        """What the service holds after one small request."""
        with self.service.awake():
            self.service.run(self._small)
            return memory.held_mb(self.service.process.pid, self.stage.device)

    def run_service(self, workload: Workload) -> ServiceRun:
        with self.service.awake():
            self.service.run(self._small)
            return self.service.run(workload)

    def peak(self) -> Facts:
        """flops_per_s of the fastest matmul, and its shape."""
        with self._peak.awake():
            return self._peak.ask(_question(self._small_file, self.stage.out, "peak"))["facts"]

    def run(self, variant: Variant, file: Path) -> Run:
        """Of the workload in a file. Raises NotMeasuredError, with the reason."""
        if variant.contestant != "vllm":
            method = "best" if variant.contestant == "transformers_best" else "plain"
            with self._lasting("transformers") as worker:
                latencies_s, pair_2N = self._asked(worker, file, method, variant.batch)
            return Run(latencies_s, pair_2N[0] - pair_2N[1])
        (sft_s, sft_1N), (reference_s, reference_1N) = self._ask_vllm(file)
        both_s = [one + other for one, other in zip(sft_s, reference_s, strict=True)]
        return Run(both_s, sft_1N[0] - reference_1N[0])

    def transformers_logprobs(self, dtype: str, file: Path) -> Logprobs:
        """[2, N] in another dtype than the run's, by a worker of its own."""
        with self.stage.transformers(self.models, dtype) as worker:
            return self._asked(worker, file, "plain", BATCHES[0])[1]

    @cached_property
    def _peak(self) -> Worker:
        return self._entered("peak", self.stage.peak())

    def _ask_vllm(self, file: Path) -> list[tuple[list[float], Logprobs]]:
        """Of each checkpoint. What cannot be started once is not tried again."""
        if self._vllm_missing is not None:
            raise self._vllm_missing
        answers = []
        for role in ("sft", "reference"):
            try:
                with self._lasting(f"vllm_{role}") as worker:
                    answers.append(self._asked(worker, file))
            except (ContestantError, NotMeasuredError) as error:
                self._vllm_missing = NotMeasuredError(str(error))
                raise self._vllm_missing from None
        return answers

    @contextmanager
    def _lasting(self, name: str) -> Iterator[Worker]:
        """A worker that stays for the next round, or where memory does not hold all of them, for this turn alone."""
        if name in self._workers:
            yield self._workers[name]
            return
        worker = self._started(name)
        if self._roomy:
            self._workers[name] = self._stack.enter_context(worker)
            yield worker
            return
        with worker:
            yield worker

    def _started(self, name: str) -> Worker:
        if name == "transformers":
            worker = self.stage.transformers(self.models, self.stage.dtype)
        else:
            worker = self.stage.vllm(self.models, name.removeprefix("vllm_"))
        self.facts[name.partition("_")[0]] = worker.facts
        return worker

    @cached_property
    def _roomy(self) -> bool:
        """Whether everybody fits into memory beside each other."""
        weights = sum(file.stat().st_size for file in self.models.rglob("*.safetensors"))
        return memory.total_bytes() > ROOM * weights

    def _entered(self, name: str, worker: Worker) -> Worker:
        self.facts[name] = worker.facts
        return self._stack.enter_context(worker)

    @cached_property
    def _small(self) -> Workload:
        """What wakes a contestant up before it is measured."""
        return draw("small", same_lengths(1, 2, 128, 128), self._vocabulary, 0)

    @cached_property
    def _small_file(self) -> Path:
        return write(self._small, self.stage.folder / "small.json")

    def _asked(self, worker: Worker, file: Path, method: str = "", batch: int = 0) -> tuple[list[float], Logprobs]:
        with worker.awake():
            worker.ask(_question(self._small_file, self.stage.out, method, batch))
            answer = worker.ask(_question(file, self.stage.out, method, batch))
        return answer["latencies_s"], np.load(self.stage.out)


def _question(file: Path, out: Path, method: str, batch: int = 0) -> Question:
    return {"workload": str(file), "out": str(out), "method": method, "batch": batch}
