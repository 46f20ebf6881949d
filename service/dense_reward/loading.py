"""Where a pair comes from: checkpoints of torch's engine, or none."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dense_reward.allocator import keep_what_was_loaded
from dense_reward.encode import Encoder
from dense_reward.engine.base import Engine, OnDevice
from dense_reward.settings import Settings


@dataclass(frozen=True, slots=True)
class Loaded:
    """What loading gives: an engine that has been proven, and the encoder that its checkpoints were trained with.

    `memory_bytes` tells what is held on each device where that is not the process's own memory.
    """

    engine: Engine
    encoder: Encoder
    tokenizer_sha256: str
    memory_bytes: Callable[[], Mapping[str, int]] = dict


Load = Callable[[Settings, Callable[[str], None], OnDevice], Loaded]
"""Loads the pair of the settings' name, sft and reference, beside those that are served."""


def load_fake(settings: Settings, report: Callable[[str], None], _: OnDevice) -> Loaded:
    """The weightless engine."""
    from dense_reward.engine.fake import FakeEngine, FakeTokenizer  # noqa: PLC0415 - the served engine is chosen here

    report("the fake engine computes numbers that mean nothing")
    return Loaded(FakeEngine(), Encoder.of(FakeTokenizer(), "plain"), "fake")


def torch_loader() -> Load:
    """Loads checkpoints; those that two pairs share once."""
    from dense_reward.engine.start import DeviceLoader, gpu_bytes  # noqa: PLC0415 - torch is imported only to serve

    loader = DeviceLoader()

    def load(settings: Settings, report: Callable[[str], None], on_device: OnDevice) -> Loaded:
        loaded = Loaded(*loader.load(settings, report, on_device), memory_bytes=gpu_bytes)
        keep_what_was_loaded()
        return loaded

    return load
