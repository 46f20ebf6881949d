"""Checkpoints in vLLM, started by this process: one AsyncLLM for each, or one for two adapters of one base.

No other file of the service imports vllm.
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
from dense_reward.engines.remote.lora import refuse_modules
from dense_reward.engines.remote.pair import Query
from dense_reward.errors import CheckpointError, EngineLostError, SequenceError, SettingsError
from dense_reward.manifest import Manifest, adapter_base_folder, files_folder
from dense_reward.records import MAX_CANDIDATES, FloatArray
from dense_reward.settings import Settings

VERSION = vllm.__version__
SHARE_ALONE, SHARE_OF_TWO = 0.9, 0.42
"""Shares of a GPU's memory for an engine: alone on the GPU, or next to the pair's other engine."""
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
_query_numbers = itertools.count()


class VllmModel:
    """One checkpoint: an AsyncLLM, or an adapter in one."""

    unavailable_reason: str | None = None  # never set: if an engine dies, the next query ends this process

    def __init__(self, engine: AsyncLLM, lora: LoRARequest | None) -> None:
        self.scores_candidates = False
        self._engine = engine
        self._lora = lora

    @property
    def max_length_tokens(self) -> int:
        return int(self._engine.model_config.max_model_len) - 1  # vLLM reserves one for the token that it samples

    @property
    def dtype(self) -> str:
        return str(self._engine.model_config.dtype).removeprefix("torch.")

    async def identify(self, probe: Query) -> None:
        """Determine by a query whether vLLM's runner supports fixed-id scoring, which candidates need."""
        try:
            await self._fixed_id_logprobs(probe)
        except (VLLMClientError, WireError):
            self.scores_candidates = False
        else:
            self.scores_candidates = True

    async def logprobs(self, query: Query) -> FloatArray:
        """[T, K], in nats. Raises SequenceError if vLLM refuses the query, EngineLostError if the engine died."""
        try:
            return await (self._fixed_id_logprobs(query) if self.scores_candidates else self._prompt_logprobs(query))
        except EngineDeadError as error:
            raise EngineLostError(f"vLLM's engine died: {error!r}") from error
        except (VLLMClientError, WireError) as error:
            raise SequenceError(f"vLLM: {error}") from error

    async def close(self) -> None:
        self._engine.shutdown()

    async def _fixed_id_logprobs(self, query: Query) -> FloatArray:
        """Scores only the wanted positions. Skips the prefix cache if the cached prefix covers the first of them."""
        for skip_cache in (False, True):
            parameters = SamplingParams(
                max_tokens=1,
                detokenize=False,
                prompt_logprob_token_ids=query.wanted_TK,
                prompt_logprob_start=query.start - 1,
                skip_reading_prefix_cache=skip_cache,
            )
            values = (await self._output(query, parameters)).prompt_token_id_logprobs
            if values is not None:
                return checked(query, values)
        raise WireError("vLLM returned no log-probs")

    async def _prompt_logprobs(self, query: Query) -> FloatArray:
        parameters = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, flat_logprobs=True)
        flat = (await self._output(query, parameters)).prompt_logprobs
        if flat is None or len(flat.start_indices) != len(query.ids_L):
            raise WireError("vLLM returned log-probs of another number of tokens than were requested")
        at_T = flat.start_indices[query.start :]
        if not np.array_equal(np.array(flat.token_ids)[at_T], query.ids_L[query.start :]):
            raise WireError("vLLM returned log-probs of other ids than were requested")
        return checked(query, np.array(flat.logprobs, dtype=np.float32)[at_T, None])

    async def _output(self, query: Query, parameters: SamplingParams) -> RequestOutput:
        prompt = TokensPrompt(prompt_token_ids=query.ids_L.tolist())
        outputs = self._engine.generate(prompt, parameters, f"query-{next(_query_numbers)}", lora_request=self._lora)
        return [output async for output in outputs][-1]


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """How vLLM serves the checkpoints. `options` are fields of AsyncEngineArgs, and override all other fields here."""

    devices: tuple[str | None, str | None]
    tensor_parallel: int
    gpu_memory_utilization: float | None
    max_length_tokens: int | None
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Weights:
    """A checkpoint's files and the dtype to compute in; for an adapter also its base, with the hashes of its files.

    The dtype is always passed to vLLM, which by default computes float32 weights in a shorter one.
    """

    files: Path
    dtype: str
    base: Path | None = None
    base_files: Mapping[str, str] = field(default_factory=dict)


def weights_of(folder: Path, manifest: Manifest, dtype: str) -> Weights:
    files = files_folder(folder, manifest)
    return Weights(files, dtype, adapter_base_folder(folder, manifest), manifest.adapter_base_files)


def vllm_options(settings: Settings) -> VllmOptions:
    """Raises SettingsError if --vllm-options is not a JSON object."""
    try:
        options = json.loads(settings.vllm_options or "{}")
    except json.JSONDecodeError as error:
        raise SettingsError(f"--vllm-options is not JSON: {error}") from None
    if not isinstance(options, dict):
        raise SettingsError("--vllm-options is not a JSON object")
    return VllmOptions(
        (settings.device, settings.reference_device or settings.device),
        settings.tensor_parallel,
        settings.gpu_memory_utilization,
        settings.max_length_tokens,
        options,
    )


def start(sft: Weights, reference: Weights, serving: VllmOptions) -> tuple[VllmModel, VllmModel]:
    """The models of a pair, in one AsyncLLM if both are adapters of one base. Call it while an event loop runs.

    Two engines on one GPU share its memory. Raises CheckpointError if vLLM cannot load a checkpoint or would compute
    wrong log-probs of it.
    """
    loras = _lora(sft, 1), _lora(reference, 2)
    if None not in loras and sft.base_files == reference.base_files:
        engine = _engine(sft, serving, serving.devices[0], SHARE_ALONE, adapters=[sft, reference])
        return VllmModel(engine, loras[0]), VllmModel(engine, loras[1])
    share = SHARE_OF_TWO if serving.devices[0] == serving.devices[1] else SHARE_ALONE
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
        modules = sorted({module for adapter in adapters for module in _adapter_modules(adapter)})
        ranks = [_adapter_rank(adapter) for adapter in adapters]
        given |= {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": _supported_rank(max(ranks))}
        given["lora_target_modules"] = modules  # by default also the output layer, which fails on CPUs
    try:
        with _visible_gpus(device):
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**{**given, **serving.options}))
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"vLLM cannot load {given['model']}: {error}") from error


@contextmanager
def _visible_gpus(device: str | None) -> Iterator[None]:
    """Limits the engine processes that start in the block to the GPUs of `device`, as in `cuda:0,1`; else all are used.

    The processes read the variable when they start. Raises CheckpointError if the device is not such a list, or names a
    GPU that is not visible to this process.
    """
    if device is None or ":" not in device:
        yield
        return
    before = os.environ.get(VISIBLE_GPUS)
    visible = before.split(",") if before else None
    try:
        indices = [int(index) for index in device.partition(":")[2].split(",")]
        os.environ[VISIBLE_GPUS] = ",".join(str(index) if visible is None else visible[index] for index in indices)
    except (ValueError, IndexError):
        limit = "" if before is None else f"; {VISIBLE_GPUS} is {before}"
        raise CheckpointError(f"there is no device {device}: name GPUs as in cuda:0 or cuda:0,1{limit}") from None
    try:
        yield
    finally:
        if before is None:
            del os.environ[VISIBLE_GPUS]
        else:
            os.environ[VISIBLE_GPUS] = before


def _lora(weights: Weights, number: int) -> LoRARequest | None:
    """None if the weights are not an adapter. Raises CheckpointError if the adapter changes the output layer."""
    if weights.base is None:
        return None
    refuse_modules(weights.files, _adapter_modules(weights))
    return LoRARequest(lora_name=f"adapter-{number}", lora_int_id=number, lora_path=str(weights.files))


def _adapter_modules(adapter: Weights) -> set[str]:
    """Last parts of the names of modules with weights: q_proj of base_model.model.x.q_proj.lora_A.weight."""
    names: set[str] = set()
    for file in adapter.files.glob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            names.update(tensors.keys())
    return {re.split(r"\.lora_|\.weight$", name)[0].rpartition(".")[2] for name in names}


def _adapter_rank(adapter: Weights) -> int:
    config = json.loads((adapter.files / "adapter_config.json").read_text())
    return max(int(rank) for rank in [config["r"], *config.get("rank_pattern", {}).values()])


def _supported_rank(rank: int) -> int:
    """The next rank that vLLM accepts."""
    return next((supported for supported in (8, 16, 32, 64, 128, 256, 320, 512) if supported >= rank), rank)
