"""Worker: the speed of the fastest matmul on this machine now, over a list of shapes. Shares refer to it."""

import argparse
import os
import time
from collections.abc import Callable

import torch
import transformers
from dense_reward.engines.kernels.packed_weights import PackedWeight
from dense_reward.engines.torch.device import computes_in
from torch import Tensor

from bench.speed.processes import Answer, Facts, Question, serve

# rows x inputs x outputs, from the linear layers of the models
CPU_SHAPES = ((1024, 896, 4864), (1024, 4864, 896), (1152, 896, 896), (1024, 512, 1536), (2048, 4864, 896))
GPU_SHAPES = ((8192, 1536, 8960), (8192, 8960, 1536), (8192, 3584, 18_944), (8192, 18_944, 3584), (8192, 8192, 8192))
REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", required=True, choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--device", required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    def start() -> tuple[Facts, "Peak"]:
        dtype = chosen_dtype(options.dtype, options.device)
        return circumstances(dtype, options.device), Peak(getattr(torch, dtype), options.device)

    serve(start)


def chosen_dtype(wanted: str, device: str) -> str:
    """Returns for auto: bfloat16 if the device computes in it, else float32."""
    if wanted != "auto":
        return wanted
    return "bfloat16" if device != "cpu" or computes_in("bfloat16") else "float32"


def circumstances(dtype: str, device: str) -> Facts:
    processor = torch.backends.cpu.get_cpu_capability() if device == "cpu" else torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"dtype": dtype, "kernels": processor, "cores": os.cpu_count(), "versions": versions}


class Peak:
    """Fastest of a few repeats over all shapes. The matrices are made once."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        shapes = CPU_SHAPES if device == "cpu" else GPU_SHAPES
        self._device = device
        self._pairs = {
            f"{m}x{k}x{n}": (torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype))
            for m, k, n in shapes
        }

    @torch.inference_mode()
    def __call__(self, _: Question) -> Answer:
        speeds = {name: self._flops_per_s(*pair) for name, pair in self._pairs.items()}
        best = max(speeds, key=lambda name: speeds[name])
        return {"facts": {"flops_per_s": speeds[best], "shape": best}}

    def _flops_per_s(self, left_MK: Tensor, right_NK: Tensor) -> float:
        """Of the faster of torch's own matmul and, on a CPU, that of a packed weight."""
        matmuls: list[Callable[[], object]] = [lambda: torch.nn.functional.linear(left_MK, right_NK)]
        if self._device == "cpu":
            packed = PackedWeight(right_NK)
            matmuls.append(lambda: packed(left_MK, None))
        return 2 * left_MK.shape[0] * right_NK.numel() / min(map(self._seconds, matmuls))

    def _seconds(self, matmul: Callable[[], object]) -> float:
        times_s = []
        for _ in range(REPEATS):
            self._wait()
            started_s = time.perf_counter()
            matmul()
            self._wait()
            times_s.append(time.perf_counter() - started_s)
        return min(times_s)

    def _wait(self) -> None:
        if self._device != "cpu":
            torch.cuda.synchronize()


if __name__ == "__main__":
    main()
