"""Where a pair comes from: the engine that the settings name. What is heavy is imported only where it is served."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dense_reward.records import Engine, OnDevice, Report
from dense_reward.settings import EngineName, Settings
from dense_reward.telemetry.process_memory import freeze_loaded_objects
from dense_reward.text.encode import Encoder


@dataclass(frozen=True, slots=True)
class LoadedPair:
    """What loading gives: an engine that has been proven, and the encoder that its checkpoints were trained with.

    `memory_bytes` tells what is held on each device where that is not the process's own memory.
    """

    engine: Engine
    encoder: Encoder
    tokenizer_sha256: str
    memory_bytes: Callable[[], Mapping[str, int]] = dict


LoadPair = Callable[[Settings, Report, OnDevice], LoadedPair]
"""Loads the pair of the settings' name, sft and reference, beside those that are served."""


def loader(engine: EngineName) -> LoadPair:
    """Loads pairs of an engine; checkpoints that two of them share once, where it can."""
    match engine:
        case "torch":
            return _torch_loader()
        case "remote" | "vllm":
            return _load_remote
        case "fake":
            return _load_fake


def _torch_loader() -> LoadPair:
    from dense_reward.engines.torch.load import DeviceLoader, gpu_bytes  # noqa: PLC0415

    torch = DeviceLoader()

    def load(settings: Settings, report: Report, on_device: OnDevice) -> LoadedPair:
        loaded = LoadedPair(*torch.load(settings, report, on_device), memory_bytes=gpu_bytes)
        freeze_loaded_objects()
        return loaded

    return load


def _load_remote(settings: Settings, report: Report, _: OnDevice) -> LoadedPair:
    from dense_reward.engines.remote.load import load_remote, load_vllm  # noqa: PLC0415

    loaded = LoadedPair(*(load_vllm if settings.engine == "vllm" else load_remote)(settings, report))
    freeze_loaded_objects()
    return loaded


def _load_fake(_: Settings, report: Report, __: OnDevice) -> LoadedPair:
    from dense_reward.engines.fake import FakeEngine, FakeTokenizer  # noqa: PLC0415

    report("the fake engine computes numbers that mean nothing")
    return LoadedPair(FakeEngine(), Encoder.of(FakeTokenizer(), "plain"), "fake")
