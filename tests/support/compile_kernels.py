"""Compiles every Triton kernel for an H100 or H200 (sm_90a), without one, and prints what NVIDIA's assembler says.

A process of its own, because the tests' process has Triton's interpreter. Prints a JSON object: for each kernel the
registers of a thread, and the bytes that it spills to memory.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import triton
from dense_reward.engines.kernels import fused_layers, fused_sums
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
H100 = GPUTarget("cuda", 90, 32)
LAYER_WARPS = 4  # Triton's default, which fused_layers leaves alone
Values = Mapping[str, int | float | bool]
Kernel = tuple[str, object, dict[str, str], Values, int]
"""Name, kernel, types of its arguments, values of its constants, warps."""


def kernels() -> Iterator[Kernel]:
    """Every kernel, for the dtypes that it reads and for the sizes of real models."""
    sums = dict.fromkeys(("C", "W", "sft_stride", "reference_stride"), "i32") | {"sums": "*fp32"}
    for dtype in ("fp32", "bf16"):
        for name, expectations, moments in (
            ("log-probs", False, False),
            ("kl", True, False),
            ("varentropy", True, True),
        ):
            types = {**sums, "sft": f"*{dtype}", "reference": f"*{dtype}"}
            values: dict[str, int | float | bool] = {
                "EXPECTATIONS": expectations,
                "MOMENTS": moments,
                "BLOCK": fused_sums._BLOCK,
            }
            yield f"sums, {name}, {dtype}", fused_sums._absorb, types, values, fused_sums._WARPS
    short = ("*bf16",) * 4
    for hidden in (896, 1536, 3584, 8192):
        types = dict(zip(("x", "weight", "out"), short, strict=False)) | {"D": "i32", "epsilon": "fp32"}
        values = {"ADDED": 0.0, "BLOCK": triton.next_power_of_2(hidden)}
        yield f"norm of {hidden}", fused_layers._norm_kernel, types, values, LAYER_WARPS
    types = dict(zip(("gate", "up", "out"), short, strict=False)) | {"count": "i32"}
    yield "gate", fused_layers._gate_kernel, types, {"BLOCK": fused_layers._ELEMENTS}, LAYER_WARPS
    for heads, size in ((14, 64), (28, 128), (4, 128), (8, 256)):
        types = dict(zip(("x", "cos", "sin", "out"), short, strict=True))
        types |= {"token_stride": "i32", "head_stride": "i32"}
        half = size // 2
        values = {"H": heads, "HALF": half}
        values |= {"HEADS": triton.next_power_of_2(heads), "BLOCK": triton.next_power_of_2(half)}
        yield f"rotation of {heads} heads of {size}", fused_layers._rotate_kernel, types, values, LAYER_WARPS


def compiled(kernel: Kernel, folder: Path) -> dict[str, int]:
    """What the assembler says of one kernel."""
    name, function, given, values, warps = kernel
    names = function.arg_names  # type: ignore[attr-defined]
    types = {argument: given.get(argument, "constexpr") for argument in names}
    aligned = {
        (names.index(argument),): [["tt.divisibility", 16]] for argument, kind in given.items() if kind[0] == "*"
    }
    source = ASTSource(
        function, types, {(names.index(argument),): value for argument, value in values.items()}, aligned
    )
    ptx = folder / "kernel.ptx"
    ptx.write_text(triton.compile(source, target=H100, options={"num_warps": warps}).asm["ptx"])
    command = [str(PTXAS), "-v", "--gpu-name=sm_90a", str(ptx), "-o", str(folder / "kernel.cubin")]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = re.search(r"Used (\d+) registers", said)
    if spilled is None or registers is None:
        raise SystemExit(f"{name}: the assembler says neither registers nor spills: {said}")
    return {"registers": int(registers[1]), "spilled": int(spilled[1]) + int(spilled[2])}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        json.dump({kernel[0]: compiled(kernel, Path(folder)) for kernel in kernels()}, sys.stdout)


if __name__ == "__main__":
    main()
