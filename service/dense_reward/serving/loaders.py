"""Chooses how pairs and token heads are loaded, by --engine. Only the chosen engine's libraries are imported."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial

from dense_reward.records import Engine, OnDevice, Report, TaughtBy
from dense_reward.settings import EngineName, Settings
from dense_reward.telemetry.process_memory import collect_replaced, freeze_libraries
from dense_reward.text.encode import Encoder


@dataclass(frozen=True, slots=True)
class LoadedPair:
    """An engine whose probes were verified, and the encoder that its checkpoints were trained with.

    `memory_bytes` returns the bytes held on each device that has its own memory, all pairs together; empty if none has.
    `taught_by` gives the engine of a teacher; None if this engine cannot be one.
    """

    engine: Engine
    encoder: Encoder
    tokenizer_sha256: str
    memory_bytes: Callable[[], Mapping[str, int]] = dict
    taught_by: TaughtBy | None = None


LoadPair = Callable[[Settings, Report, OnDevice], LoadedPair]
"""Loads the pair or token head of the settings, while others are served. Raises CheckpointError or SettingsError.

It runs on the registry's loading thread. It reports each step, and runs what uses the device through OnDevice.
"""


def loader(engine: EngineName) -> LoadPair:
    """The function that loads pairs of this engine. Engine torch loads a checkpoint that two pairs share only once."""
    match engine:
        case "torch":
            return _torch_loader()
        case "remote" | "vllm":
            return _load_remote
        case "fake":
            return _load_fake


def _torch_loader() -> LoadPair:
    from dense_reward.engines.teacher.engine import TorchTeacher  # noqa: PLC0415
    from dense_reward.engines.token_head.load import load_token_head  # noqa: PLC0415
    from dense_reward.engines.torch.load import DeviceLoader, gpu_bytes  # noqa: PLC0415

    torch = DeviceLoader(make_room=collect_replaced)
    freeze_libraries_once = cache(freeze_libraries)

    def load(settings: Settings, report: Report, on_device: OnDevice) -> LoadedPair:
        freeze_libraries_once()  # here and not before: the application and its server exist by now
        if settings.token_head is None:
            engine, encoder, tokenizer_sha256 = torch.load(settings, report, on_device)
            loaded = LoadedPair(engine, encoder, tokenizer_sha256, gpu_bytes, partial(TorchTeacher, engine))
        else:
            serving = torch.serving(settings)
            context = torch.context(report, on_device)
            loaded = LoadedPair(*load_token_head(settings.token_head, serving, context), memory_bytes=gpu_bytes)
        return loaded

    return load


def _load_remote(settings: Settings, report: Report, _: OnDevice) -> LoadedPair:
    from dense_reward.engines.remote.load import load_remote, load_vllm  # noqa: PLC0415

    loaded = LoadedPair(*(load_vllm if settings.engine == "vllm" else load_remote)(settings, report))
    freeze_libraries()  # with the pair: it is served until the process ends
    return loaded


def _load_fake(_: Settings, report: Report, __: OnDevice) -> LoadedPair:
    from dense_reward.engines.fake import FakeEngine, FakeTeacher, FakeTokenizer  # noqa: PLC0415

    report("the fake engine computes meaningless rewards, for tests")
    engine = FakeEngine()
    return LoadedPair(engine, Encoder.of(FakeTokenizer(), "plain"), "fake", taught_by=partial(FakeTeacher, engine))
