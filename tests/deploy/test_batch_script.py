"""The batch script for Slurm: sbatch takes its options, and it starts the real service."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PATIENCE_S = 120.0
SRUN = """#!/bin/sh
SLURM_PROCID=0 SLURM_LOCALID=0 exec "$@"
"""
# As of a cluster with GPUs; nothing listens at the address, so that sbatch ends once it has read the script.
SLURM_CONF = (
    "ClusterName=x\nSlurmctldHost=localhost(127.0.0.1)\nSelectType=select/cons_tres\nGresTypes=gpu\nMessageTimeout=2\n"
)


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="sbatch is not installed (Debian: slurm-client)")
def test_sbatch_takes_the_options_of_the_script(tmp_path: Path) -> None:
    (tmp_path / "slurm.conf").write_text(SLURM_CONF)
    known = os.environ | {"SLURM_CONF": str(tmp_path / "slurm.conf")}
    script = (EXAMPLES / "slurm.sh").read_text("utf-8")
    for text, reason in (
        (script, "Unable to contact slurm controller"),
        (script.replace("--gpus-", "--gpu-"), "option"),
    ):
        (tmp_path / "job.sh").write_text(text)
        command = ["sbatch", "--test-only", str(tmp_path / "job.sh"), "a", "b", "c"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=known)
        assert reason in done.stderr


@pytest.mark.slow
def test_the_batch_script_serves_and_writes_down_the_address(tmp_path: Path) -> None:
    """The script itself, with the fake engine: only srun, which would start it on the nodes, is a stand-in."""
    (tmp_path / "keys.json").write_text('[{"name": "job", "key": "a-key-of-the-tests-0123", "rights": ["score"]}]')
    (tmp_path / "bin").mkdir()
    programs = {
        "srun": SRUN,
        "dense-reward": f'#!/bin/sh\nexec {sys.executable} -m dense_reward.cli "$@" --engine fake\n',
    }
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    variables = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": str(os.getpid())}
    command = ["bash", str(EXAMPLES / "slurm.sh"), "sft", "reference", "keys.json"]
    address = tmp_path / f"rewards-{os.getpid()}" / "0"
    with subprocess.Popen(command, cwd=tmp_path, env=variables, stderr=subprocess.DEVNULL) as service:
        try:
            end = time.monotonic() + PATIENCE_S
            while not address.is_file() or not address.read_text():
                assert service.poll() is None, "the service ended"
                assert time.monotonic() < end, "no address was written"
                time.sleep(0.1)
            assert address.read_text().startswith("http://")
            service.terminate()
            assert service.wait(PATIENCE_S) == 0
        finally:
            service.kill()
