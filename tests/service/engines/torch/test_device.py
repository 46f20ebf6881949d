"""`auto` never falls back to the CPU in silence where a GPU is wanted; on a machine without any sign of one it does."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dense_reward.engines.torch import load
from dense_reward.engines.torch.device import GpuFacts, chosen_device, gpu_facts
from dense_reward.errors import CheckpointError

NOTHING = GpuFacts("2.13.0+cu130", "13.0", usable=False, driver=None, files=False, variables={})
GPU = replace(NOTHING, usable=True, driver="580.65.06", files=True)
BROKEN = replace(GPU, usable=False)


def variables(**named: str) -> dict[str, str]:
    return {"PATH": "/bin", **named}


@pytest.mark.parametrize(
    ("facts", "chosen"),
    [
        (GPU, "cuda"),
        (NOTHING, "cpu"),  # pip's default torch has CUDA on every machine
        (replace(NOTHING, torch_cuda=None), "cpu"),
        (replace(BROKEN, variables=variables(CUDA_VISIBLE_DEVICES="")), "cpu"),
        (replace(BROKEN, variables=variables(CUDA_VISIBLE_DEVICES="-1")), "cpu"),
        (replace(BROKEN, variables=variables(NVIDIA_VISIBLE_DEVICES="void")), "cpu"),
        (replace(BROKEN, variables=variables(NVIDIA_VISIBLE_DEVICES="all", CUDA_VISIBLE_DEVICES="")), "cpu"),
        (replace(NOTHING, torch_cuda=None, driver="580.65"), "cpu"),  # a CPU's container on a host with GPUs
    ],
    ids=lambda value: "",
)
def test_auto_takes_a_gpu_or_the_cpu_where_no_gpu_is_wanted(facts: GpuFacts, chosen: str) -> None:
    assert chosen_device("auto", facts) == chosen


@pytest.mark.parametrize(
    ("facts", "wanted", "cure"),
    [
        (replace(NOTHING, variables=variables(CUDA_VISIBLE_DEVICES="0")), "CUDA_VISIBLE_DEVICES=0", "no NVIDIA driver"),
        (replace(NOTHING, variables=variables(NVIDIA_VISIBLE_DEVICES="all")), "NVIDIA_VISIBLE_DEVICES=all", "--gpus"),
        (replace(BROKEN, files=False), "an NVIDIA driver is loaded", "nvidia.com/gpu"),
        (replace(BROKEN, torch_cuda=None), "/dev/nvidia0 exists", "install a CUDA build of torch"),
        (replace(BROKEN, driver="535.104"), "/dev/nvidia0 exists", "older than CUDA 13.0 needs (580 or newer)"),
        (replace(BROKEN, driver="525.60", torch_cuda="12.8"), "/dev/nvidia0 exists", "run nvidia-smi"),
        (BROKEN, "/dev/nvidia0 exists", "run nvidia-smi"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_auto_fails_where_a_gpu_is_wanted_and_none_is_usable(facts: GpuFacts, wanted: str, cure: str) -> None:
    with pytest.raises(CheckpointError) as failed:
        chosen_device("auto", facts)
    message = str(failed.value)
    assert f"({wanted})" in message
    assert cure in message
    assert "torch 2.13.0+cu130" in message
    assert f"driver {facts.driver or 'not found'}" in message
    assert "set device to cpu" in message


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_named_gpu_that_is_not_there_is_an_error(name: str) -> None:
    assert chosen_device(name, GPU) == name
    with pytest.raises(CheckpointError, match=f"device {name}: torch can use no GPU"):
        chosen_device(name, NOTHING)


def test_the_cpu_by_name_is_the_cpu_everywhere() -> None:
    assert chosen_device("cpu", BROKEN) == chosen_device("cpu", GPU) == "cpu"


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n", "535.104.05"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65  Release Build\nGCC version: 12.3.0",
            "580.65",
        ),
        ("another format", "0"),
    ],
)
def test_facts_are_read_from_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, version: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (gpu_facts(tmp_path).driver, gpu_facts(tmp_path).files) == (None, False)
    for name, content in {"proc/driver/nvidia/version": text, "dev/nvidia0": ""}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    facts = gpu_facts(tmp_path)
    assert (facts.driver, facts.files, facts.usable) == (version, True, False)
    assert facts.torch_version == torch.__version__
    assert facts.wanted == "CUDA_VISIBLE_DEVICES=3"


@pytest.mark.parametrize(("setting", "why"), [("auto", "--device auto found no GPU"), ("cpu", "--device cpu")])
def test_a_service_on_the_cpu_says_so_once(caplog: pytest.LogCaptureFixture, setting: str, why: str) -> None:
    loader = load.DeviceLoader()
    with caplog.at_level(logging.WARNING, "dense_reward"):
        for _ in range(2):
            loader.warn_of_cpu("cpu", setting)
    assert [record.message for record in caplog.records] == [
        f"models run on the CPU, much slower than on a GPU ({why})"
    ]
    caplog.clear()
    load.DeviceLoader().warn_of_cpu("cuda", setting)
    assert not caplog.records
