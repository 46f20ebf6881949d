"""Chooses the device, says what it computes in, and names its failures.

`auto` is the CPU only if nothing asks for a GPU; otherwise an unusable GPU is an error.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dense_reward.errors import CheckpointError, EngineLostError, OutOfMemoryError
from dense_reward.records import Result

# torch.OutOfMemoryError covers only torch's allocator of GPU memory; the rest is a RuntimeError with one of these.
OUT_OF_MEMORY = ("DefaultCPUAllocator: ", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
DEVICE_LOST = ("CUDA error", "device-side assert")  # after one of these every later call fails too
CPU_CAPABILITIES = {"bfloat16": ("avx512_bf16", "amx_bf16"), "float16": ("avx512_fp16", "amx_fp16")}
"""Instruction sets of x86 that compute in a short dtype, by the names of `torch.cpu.get_capabilities`."""
NO_GPU_NAMED = {"CUDA_VISIBLE_DEVICES": {"", "-1", "NoDevFiles"}, "NVIDIA_VISIBLE_DEVICES": {"", "void", "none"}}
"""Values of these variables that name no GPU. Any other value asks for one."""
OLDEST_DRIVERS = {11: 450, 12: 525, 13: 580}
"""The oldest driver (first number of its version) for each CUDA version, from NVIDIA's table of compatibility."""


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """What the machine and torch say about GPUs. `driver`: version of NVIDIA's kernel module, None without one.

    `files`: whether there are device files. A container sees the module of its host, but files only of its own GPUs.
    """

    torch_version: str
    torch_cuda: str | None
    usable: bool
    driver: str | None
    files: bool
    variables: Mapping[str, str]

    @property
    def wanted(self) -> str | None:
        """The reason to expect a GPU; None if there is none."""
        named = {name: value for name, value in self.variables.items() if name in NO_GPU_NAMED}
        for name, value in named.items():
            if value.strip() in NO_GPU_NAMED[name]:
                return None
        if named:
            return " and ".join(f"{name}={value}" for name, value in named.items())
        if self.files:
            return "/dev/nvidia0 exists"
        # Without files, a build of torch for CPUs fits the machine: both are what a CPU's container has.
        return "an NVIDIA driver is loaded" if self.driver is not None and self.torch_cuda is not None else None

    @property
    def cure(self) -> str:
        """The likely reason why torch can use no GPU, and what to do."""
        if self.torch_cuda is None:
            return "this build of torch is for CPUs only: install a CUDA build of torch"
        if self.driver is None:
            return "there is no NVIDIA driver: install it; in a container, start that with --gpus all"
        if not self.files:
            return "this container has no GPU: start it with --gpus all; on Kubernetes, request nvidia.com/gpu"
        oldest = OLDEST_DRIVERS.get(int(self.torch_cuda.partition(".")[0]))
        if oldest is not None and int(self.driver.partition(".")[0]) < oldest:
            return (
                f"the driver is older than CUDA {self.torch_cuda} needs ({oldest} or newer): update it, or install a "
                "build of torch for an older CUDA"
            )
        return "run nvidia-smi: either the GPUs do not work, or CUDA_VISIBLE_DEVICES names none of them"


def computes_in(dtype: str) -> bool:
    """Whether this processor has arithmetic for a short dtype.

    On x86 oneDNN's answer is not enough: it is yes for every AVX-512, also if bfloat16 is emulated there, five times
    slower than float32 (oneDNN of torch 2.13).
    """
    found: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # not in torch 2.10
    if found.get("architecture") == "x86_64":
        return any(found.get(name) for name in CPU_CAPABILITIES[dtype])
    if dtype == "bfloat16":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def gpu_facts(root: Path = Path("/")) -> GpuFacts:
    """The facts of this process. `root`: where the machine's files are."""
    return GpuFacts(
        torch_version=torch.__version__,
        torch_cuda=torch.version.cuda,
        usable=torch.cuda.is_available(),
        driver=_driver(root / "proc/driver/nvidia/version"),
        files=(root / "dev/nvidia0").exists(),
        variables=dict(os.environ),
    )


def _driver(file: Path) -> str | None:
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", file.read_text())
    except OSError:
        return None
    return found.group() if found else "0"


def chosen_device(name: str, facts: GpuFacts | None = None) -> str:
    """The torch device for `auto`, `cpu`, `cuda` or `cuda:1`.

    Raises CheckpointError, with versions and the likely cure, if a GPU is named, or wanted by auto, but none is usable.
    """
    facts = gpu_facts() if facts is None else facts
    if name == "auto":
        if facts.usable:
            return "cuda"
        if facts.wanted is None:
            return "cpu"
        why = f"device auto: a GPU is wanted here ({facts.wanted}), but torch can use none"
    elif name.startswith("cuda") and not facts.usable:
        why = f"device {name}: torch can use no GPU"
    else:
        return name
    cuda = "no CUDA" if facts.torch_cuda is None else f"CUDA {facts.torch_cuda}"
    versions = f"torch {facts.torch_version} with {cuda}, driver {facts.driver or 'not found'}"
    raise CheckpointError(f"{why} ({versions}). {facts.cure}. To compute on the CPU, set device to cpu")


def start_host_copy(values: Tensor) -> Callable[[], NDArray[np.float32]]:
    """Start to copy float32 values to the host. The returned call waits for it, not for later work."""
    if values.device.type != "cuda":
        return values.cpu().numpy
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # the waiting thread sleeps
    copied.record(torch.cuda.current_stream(values.device))

    def wait() -> NDArray[np.float32]:
        copied.synchronize()
        return host.numpy().copy()  # scores can be kept for long, pinned memory should not

    return wait


def with_device_errors(call: Callable[[], Result]) -> Result:
    """Call something that uses a device. Raises OutOfMemoryError or EngineLostError for the device's own failures."""
    try:
        return call()
    except RuntimeError as error:
        reason = str(error)
        if not isinstance(error, torch.OutOfMemoryError) and not any(mark in reason for mark in OUT_OF_MEMORY):
            if isinstance(error, torch.AcceleratorError) or any(mark in reason for mark in DEVICE_LOST):
                raise EngineLostError(reason) from error
            raise
    # Outside `except`: as its context, torch's error would keep every tensor of the batch alive by its traceback.
    raise OutOfMemoryError(reason)
