"""Where a pair comes from: the engine that the settings name. What is heavy is imported only where it is served."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dense_reward.records import Engine, OnDevice
from dense_reward.settings import EngineName, Settings
from dense_reward.telemetry.process_memory import keep_what_was_loaded
from dense_reward.text.encode import Encoder


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


def loader(engine: EngineName) -> Load:
    """Loads pairs of an engine; checkpoints that two of them share once, where it can."""
    match engine:
        case "torch":
            return _torch_loader()
        case "remote" | "vllm":
            return _load_elsewhere
        case "fake":
            return _load_fake


def _torch_loader() -> Load:
    from dense_reward.engines.torch.start import DeviceLoader, gpu_bytes  # noqa: PLC0415

    torch = DeviceLoader()

    def load(settings: Settings, report: Callable[[str], None], on_device: OnDevice) -> Loaded:
        loaded = Loaded(*torch.load(settings, report, on_device), memory_bytes=gpu_bytes)
        keep_what_was_loaded()
        return loaded

    return load


def _load_elsewhere(settings: Settings, report: Callable[[str], None], _: OnDevice) -> Loaded:
    from dense_reward.engines.remote.load import load_remote, load_vllm  # noqa: PLC0415

    loaded = Loaded(*(load_vllm if settings.engine == "vllm" else load_remote)(settings, report))
    keep_what_was_loaded()
    return loaded


def _load_fake(_: Settings, report: Callable[[str], None], __: OnDevice) -> Loaded:
    from dense_reward.engines.fake import FakeEngine, FakeTokenizer  # noqa: PLC0415

    report("the fake engine computes numbers that mean nothing")
    return Loaded(FakeEngine(), Encoder.of(FakeTokenizer(), "plain"), "fake")
