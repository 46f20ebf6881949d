"""Settings -> a proven pair on its device."""

import torch

from dense_reward.engines.torch.load import Loading, Models, Report, Serving, load_pair
from dense_reward.engines.torch.pair import PairEngine
from dense_reward.errors import CheckpointError
from dense_reward.records import OnDevice
from dense_reward.settings import Settings
from dense_reward.text.encode import Encoder


class DeviceLoader:
    """Loads pairs one after another; checkpoints that are in use already are not loaded twice."""

    def __init__(self) -> None:
        self._models = Models()

    def load(self, settings: Settings, report: Report, on_device: OnDevice) -> tuple[PairEngine, Encoder, str]:
        """Engine, encoder and tokenizer hash. Raises CheckpointError, naming the cure."""
        if settings.sft is None or settings.reference is None:
            raise CheckpointError("give both checkpoints: --sft DIR --reference DIR")
        loading = Loading(report, on_device, self._models)
        engine, tokenizer, manifest = load_pair(settings.sft, settings.reference, serving_of(settings), loading)
        return engine, Encoder(tokenizer, manifest.renderer, manifest.end_of_turn_id), manifest.tokenizer_sha256


def gpu_bytes() -> dict[str, int]:
    """What torch holds on each GPU, what it keeps for later batches included."""
    return {f"cuda:{at}": torch.cuda.memory_reserved(at) for at in range(torch.cuda.device_count())}


def serving_of(settings: Settings) -> Serving:
    """How to serve, with the device found; and the process made ready for it."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = _device(settings.device)
    torch.use_deterministic_algorithms(settings.deterministic)
    return Serving(
        dtype=settings.dtype,
        head_dtype=settings.head_dtype,
        norm_dtype=settings.norm_dtype,
        device=device,
        reference_device=None if settings.reference_device is None else _device(settings.reference_device),
        max_batch_tokens=settings.max_batch_tokens,
        deterministic=settings.deterministic,
        allow_unrelated=settings.allow_unrelated,
    )


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise CheckpointError(
            f"device {name} is not there: torch sees no GPU (use --device cpu, or a CUDA build of torch)"
        )
    return name
