"""The command that starts a job on several GPUs or machines. It is printed, never run."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal, get_args

from dense_reward_trainer.errors import ConfigError

Strategy = Literal["ddp", "fsdp2", "zero3"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
_PORT = 29500
_PROGRAM = ("-m", "dense_reward_trainer.cli")


@dataclass(frozen=True, slots=True)
class Cluster:
    """`gpus`: of each machine."""

    machines: int
    gpus: int

    @classmethod
    def of(cls, text: str) -> "Cluster":
        """Reads `8` (GPUs of one machine) or `2x8` (machines x GPUs of each). Raises ConfigError."""
        matched = re.fullmatch(r"(?:([1-9]\d{0,3})x)?([1-9]\d{0,3})", text.strip())
        if matched is None:
            raise ConfigError(f"--launch {text}: give the number of GPUs, such as 8, or MACHINESxGPUS, such as 2x8")
        return cls(int(matched[1] or 1), int(matched[2]))

    @property
    def processes(self) -> int:
        return self.machines * self.gpus


def launch_command(cluster: Cluster, strategy: Strategy, arguments: Sequence[str]) -> str:
    """The command for `dense-reward-train ARGUMENTS` on a cluster, quoted for a shell.

    With several machines it runs on each of them; $MAIN_HOST is the name of the first and $MACHINE the number of each,
    from 0. Raises ConfigError if a strategy that shares weights gets one GPU.
    """
    job = shlex.join(arguments)
    if cluster.processes == 1:
        if strategy != "ddp":
            raise ConfigError(f"--strategy {strategy} shares the weights among GPUs, but --launch names one: use ddp")
        return f"dense-reward-train {job}"
    launcher = _torchrun(cluster) if strategy == "ddp" else _accelerate(cluster, strategy)
    return f"{launcher} {shlex.join(_PROGRAM)} {job}"


def launch_file(strategy: Strategy) -> Path:
    """accelerate's configuration of a strategy, as shipped."""
    return Path(str(resources.files("dense_reward_trainer") / "recipes" / "launch" / f"{strategy}.yaml"))


def _torchrun(cluster: Cluster) -> str:
    if cluster.machines == 1:
        return f"torchrun --standalone --nproc_per_node {cluster.gpus}"
    return (
        f"torchrun --nnodes {cluster.machines} --node_rank $MACHINE --nproc_per_node {cluster.gpus} "
        f"--master_addr $MAIN_HOST --master_port {_PORT}"
    )


def _accelerate(cluster: Cluster, strategy: Strategy) -> str:
    launcher = (
        f"accelerate launch --config_file {shlex.quote(str(launch_file(strategy)))} "
        f"--num_processes {cluster.processes} --num_machines {cluster.machines}"
    )
    if cluster.machines == 1:
        return launcher
    return f"{launcher} --machine_rank $MACHINE --main_process_ip $MAIN_HOST --main_process_port {_PORT}"
