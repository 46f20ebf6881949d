"""Every Triton kernel compiles for an H100 or H200 without one, and spills no register to memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[3] / "support/compile_kernels.py"


def test_no_kernel_spills() -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    assert len(found) == 6 + 4 + 1 + 4
    for name, says in found.items():
        assert says["spilled"] == 0, name
