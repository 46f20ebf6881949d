"""A checkpoint in vLLM, in this process: one AsyncLLM per model, two adapters of one base in one AsyncLLM.

The service's only file that imports vllm.
"""

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import vllm
from safetensors import safe_open
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMClientError
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from dense_reward.engines.remote.dialects import WireError, checked
from dense_reward.engines.remote.lora import refuse_named
from dense_reward.engines.remote.pair import Query
from dense_reward.errors import CheckpointError, EngineLostError, SequenceError, SettingsError
from dense_reward.manifest import Manifest, files_folder
from dense_reward.records import MAX_CANDIDATES, FloatArray
from dense_reward.settings import Settings

VERSION = vllm.__version__
ALONE, SHARED = 0.9, 0.42
"""Of a GPU's memory, for each engine."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
_IDS = itertools.count()


class VllmModel:
    """One checkpoint: an engine, or an adapter in it; names candidates where its runner scores fixed ids."""

    unavailable_reason: str | None = None  # an engine that died takes the process with it, at the next query

    def __init__(self, engine: AsyncLLM, lora: LoRARequest | None) -> None:
        self.names_candidates = False
        self._engine = engine
        self._lora = lora

    @property
    def max_length_tokens(self) -> int:
        return int(self._engine.model_config.max_model_len) - 1  # it keeps room for the token that it samples

    @property
    def dtype(self) -> str:
        return str(self._engine.model_config.dtype).removeprefix("torch.")

    async def identify(self, probe: Query) -> None:
        """Find out by asking whether it gives log-probs of any ids."""
        try:
            await self._named(probe)
        except (VLLMClientError, WireError):
            self.names_candidates = False
        else:
            self.names_candidates = True

    async def logprobs(self, query: Query) -> FloatArray:
        """[T, K], in nats. Raises SequenceError where vLLM takes no such query, EngineLostError."""
        try:
            return await (self._named(query) if self.names_candidates else self._own(query))
        except EngineDeadError as error:
            raise EngineLostError(f"vLLM's engine died: {error!r}") from error
        except (VLLMClientError, WireError) as error:
            raise SequenceError(f"vLLM: {error}") from error

    async def close(self) -> None:
        self._engine.shutdown()

    async def _named(self, query: Query) -> FloatArray:
        """Scores the wanted positions alone. What is remembered of a prompt serves, unless it passes the first one."""
        for fresh in (False, True):
            wanted = SamplingParams(
                max_tokens=1,
                detokenize=False,
                prompt_logprob_token_ids=query.wanted_TK,
                prompt_logprob_start=query.start - 1,
                skip_reading_prefix_cache=fresh,
            )
            values = (await self._output(query, wanted)).prompt_token_id_logprobs
            if values is not None:
                return checked(query, values)
        raise WireError("vLLM gave no log-probs")

    async def _own(self, query: Query) -> FloatArray:
        wanted = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, flat_logprobs=True)
        flat = (await self._output(query, wanted)).prompt_logprobs
        if flat is None or len(flat.start_indices) != len(query.ids_L):
            raise WireError("vLLM gave log-probs of other tokens than were asked for")
        at_T = flat.start_indices[query.start :]
        if not np.array_equal(np.array(flat.token_ids)[at_T], query.ids_L[query.start :]):
            raise WireError("vLLM gave log-probs of other ids than were asked for")
        return checked(query, np.array(flat.logprobs, dtype=np.float32)[at_T, None])

    async def _output(self, query: Query, wanted: SamplingParams) -> RequestOutput:
        prompt = TokensPrompt(prompt_token_ids=query.ids_L.tolist())
        outputs = self._engine.generate(prompt, wanted, f"query-{next(_IDS)}", lora_request=self._lora)
        return [output async for output in outputs][-1]


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """How checkpoints are served by vLLM; `options` are fields of its AsyncEngineArgs, and go over all others here."""

    devices: tuple[str | None, str | None]
    tensor_parallel: int
    gpu_memory_utilization: float | None
    max_length_tokens: int | None
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Weights:
    """A checkpoint's files, the dtype to compute in, and the base that they are an adapter to, with its files' hashes.

    The dtype is named because vLLM's own choice for float32 weights is a shorter one.
    """

    files: Path
    dtype: str
    base: Path | None = None
    base_files: Mapping[str, str] = field(default_factory=dict)


def weights_of(folder: Path, manifest: Manifest, dtype: str) -> Weights:
    files = files_folder(folder, manifest)
    base = None if manifest.adapter_base is None else Path(manifest.adapter_base)
    return Weights(files, dtype, base, manifest.adapter_base_files)


def vllm_options(settings: Settings) -> VllmOptions:
    """Raises SettingsError where --vllm-options are no JSON object."""
    try:
        options = json.loads(settings.vllm_options or "{}")
    except json.JSONDecodeError as error:
        raise SettingsError(f"--vllm-options is no JSON: {error}") from None
    if not isinstance(options, dict):
        raise SettingsError("--vllm-options is no JSON object")
    return VllmOptions(
        (settings.device, settings.reference_device or settings.device),
        settings.tensor_parallel,
        settings.gpu_memory_utilization,
        settings.max_length_tokens,
        options,
    )


def start(sft: Weights, reference: Weights, serving: VllmOptions) -> tuple[VllmModel, VllmModel]:
    """The models of a pair; in one engine where both are adapters to one base. To be called where an event loop runs.

    Two engines that share a GPU take half of it each, less what else there is. Raises CheckpointError for what vLLM
    would compute wrong or cannot load.
    """
    loras = _lora(sft, 1), _lora(reference, 2)
    if None not in loras and sft.base_files == reference.base_files:
        engine = _engine(sft, serving, serving.devices[0], ALONE, adapters=[sft, reference])
        return VllmModel(engine, loras[0]), VllmModel(engine, loras[1])
    share = SHARED if serving.devices[0] == serving.devices[1] else ALONE
    first, second = (
        VllmModel(_engine(weights, serving, device, share, adapters=[] if lora is None else [weights]), lora)
        for weights, lora, device in zip((sft, reference), loras, serving.devices, strict=True)
    )
    return first, second


def _engine(
    weights: Weights, serving: VllmOptions, device: str | None, share: float, *, adapters: Sequence[Weights]
) -> AsyncLLM:
    given: dict[str, Any] = {
        "model": str(weights.base or weights.files),
        "skip_tokenizer_init": True,
        "dtype": weights.dtype,
        "tensor_parallel_size": serving.tensor_parallel,
        "gpu_memory_utilization": serving.gpu_memory_utilization or share,
        "disable_log_stats": True,
        "max_logprobs": MAX_CANDIDATES + 1,
        "max_model_len": serving.max_length_tokens and serving.max_length_tokens + 1,
    }
    if adapters:
        modules = sorted({module for adapter in adapters for module in _modules(adapter)})
        ranks = [_rank(adapter) for adapter in adapters]
        given |= {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": _allowed_rank(max(ranks))}
        given["lora_target_modules"] = modules  # else the output layer is made ready for one, which breaks on CPUs
    try:
        with _visible(device):
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**{**given, **serving.options}))
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"vLLM cannot load {given['model']}: {error}") from error


@contextmanager
def _visible(device: str | None) -> Iterator[None]:
    """An engine's processes see the GPUs that the environment names when they start: those of `cuda:0,1`, or all.

    Raises CheckpointError where the device is no such list, or names one that is not visible to begin with.
    """
    if device is None or ":" not in device:
        yield
        return
    before = os.environ.get(VISIBLE)
    listed = before.split(",") if before else None
    try:
        indices = [int(index) for index in device.partition(":")[2].split(",")]
        os.environ[VISIBLE] = ",".join(str(index) if listed is None else listed[index] for index in indices)
    except (ValueError, IndexError):
        visible = "" if before is None else f"; visible are {before}"
        raise CheckpointError(f"device {device} is not there: name GPUs as in cuda:0 or cuda:0,1{visible}") from None
    try:
        yield
    finally:
        if before is None:
            del os.environ[VISIBLE]
        else:
            os.environ[VISIBLE] = before


def _lora(weights: Weights, number: int) -> LoRARequest | None:
    """Raises CheckpointError where the adapter changes the output layer: vLLM leaves that out of prompt log-probs."""
    if weights.base is None:
        return None
    refuse_named(weights.files, _modules(weights))
    return LoRARequest(lora_name=f"adapter-{number}", lora_int_id=number, lora_path=str(weights.files))


def _modules(adapter: Weights) -> set[str]:
    """The modules that an adapter has weights for, by their last names: base_model.model.x.q_proj.lora_A.weight."""
    names: set[str] = set()
    for file in adapter.files.glob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            names.update(tensors.keys())
    return {re.split(r"\.lora_|\.weight$", name)[0].rpartition(".")[2] for name in names}


def _rank(weights: Weights) -> int:
    config = json.loads((weights.files / "adapter_config.json").read_text())
    return max(int(rank) for rank in [config["r"], *config.get("rank_pattern", {}).values()])


def _allowed_rank(rank: int) -> int:
    """vLLM takes certain numbers alone."""
    return next((allowed for allowed in (8, 16, 32, 64, 128, 256, 320, 512) if allowed >= rank), rank)
