"""Where and how a run is made: device, dtype, threads, folders, and how each process is started."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from bench.speed.processes import NotMeasuredError, Worker
from bench.speed.service import Service

QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TQDM_DISABLE": "1", "VLLM_NO_USAGE_STATS": "1"}


@dataclass(frozen=True, slots=True)
class Stage:
    """Paths are relative to the repository's root, where the run is started."""

    device: str
    dtype: str
    threads: int
    vllm_folder: Path
    folder: Path = Path("runs/bench/speed")
    models: Path = Path("runs/bench/models")

    @property
    def out(self) -> Path:
        """Where workers leave log-probs."""
        return self.folder / "logprobs.npy"

    def in_dtype(self, dtype: str) -> "Stage":
        return replace(self, dtype=dtype)

    def pair(self, shape_name: str) -> Path:
        """The folder of a shape's two checkpoints, made where they are not there yet."""
        folder = self.models / shape_name
        command = [sys.executable, "-m", "bench.speed.models", shape_name, str(folder)]
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
        """Raises NotMeasuredError where there is no vLLM, with the reason that its installation gave."""
        if not (self.vllm_folder / "bin" / "vllm").exists():
            raise NotMeasuredError(_why_missing(self.vllm_folder))
        environment = {"VLLM_LOGGING_LEVEL": "WARNING", **(self.vllm_on_cpu() if self.device == "cpu" else {})}
        arguments = ("--folder", str(models / role), "--dtype", self.dtype, *flags)
        return self._worker(
            "vllm", *arguments, log=f"vllm_{role}", python=str(self.vllm_folder / "bin" / "python"), **environment
        )

    def vllm_on_cpu(self) -> dict[str, str]:
        """All cores (its default leaves one out), Intel's OpenMP, which it asks for, and 1 GiB for keys and values."""
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
