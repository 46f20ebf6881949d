"""The examples for other programs run as they stand, against a real service."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from served_pair import ServedPair, environment

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.mark.parametrize("name", ["trl_dense", "trl_scalar"])
def test_an_example_trains_three_steps_and_saves_a_model(
    name: str, served: ServedPair, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), str(served.folder / "sft"), served.url, "--steps", "3"]
    done = subprocess.run(
        command,
        env=environment() | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]  # also at exit, when it is only reported
    steps = done.stdout.count("'grad_norm'")
    record_property("trl_steps", steps)
    assert steps == 3
    expected = "'dense_reward/reward_sum'" if name == "trl_dense" else "'rewards/dense_sum/mean'"
    assert done.stdout.count(expected) == 3
    assert (tmp_path / "runs" / name / "model.safetensors").is_file()
