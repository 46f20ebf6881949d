"""Two checkpoints on disk -> a pair that was proven to be one and to be computed right."""

import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

import numpy as np
import torch

from dense_reward.engines.tokenizer import TransformersTokenizer, load_tokenizer
from dense_reward.engines.torch.memory import peak_bytes
from dense_reward.engines.torch.model import DTYPES, TorchModel, load_model
from dense_reward.engines.torch.packing_check import obstacle
from dense_reward.engines.torch.pair import QUANTITIES, How, PairEngine
from dense_reward.errors import CheckpointError
from dense_reward.manifest import Manifest, check_pair, files_folder, load_manifest, sha256_of_text, verify_files
from dense_reward.records import Branch, EngineInfo, OnDevice, Trunk, Wants

Report = Callable[[str], None]
Result = TypeVar("Result")
ROLES = ("sft", "reference")
# Root mean square of (served - stored) log-probs over the probe, in nats, above which a service does not start. Wrong
# attention or positions are wrong by more than 0.5; rounding is a tenth of each bound on the models that were tried.
PROBE_TOLERANCE_NATS = {"float64": 1e-3, "float32": 1e-3, "float16": 0.1, "bfloat16": 0.3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """How a pair is to be served. `dtype` None: the checkpoint's own, or float32 where the processor lacks that."""

    dtype: str | None = None
    head_dtype: str | None = None
    norm_dtype: str | None = None
    device: str = "cpu"
    reference_device: str | None = None
    max_batch_tokens: int
    deterministic: bool = False
    allow_unrelated: bool = False


class Models:
    """The models that are in use, by all that their rows and logits depend on; forgotten with their last pair."""

    def __init__(self) -> None:
        self._models: WeakValueDictionary[Hashable, TorchModel] = WeakValueDictionary()

    def get(self, key: Hashable, load: Callable[[], TorchModel]) -> TorchModel:
        model = self._models.get(key)
        if model is None:
            model = self._models[key] = load()
        return model


def _at_once(call: Callable[[], Result]) -> Result:
    return call()


@dataclass(frozen=True, slots=True)
class Loading:
    """What loading needs besides the checkpoints: who is told of each step, the device, and what is loaded already."""

    report: Report
    on_device: OnDevice = _at_once
    models: Models = field(default_factory=Models)


def load_pair(
    sft: Path, reference: Path, serving: Serving, loading: Loading
) -> tuple[PairEngine, TransformersTokenizer, Manifest]:
    """Load two checkpoints, prove them, and return engine, tokenizer and the sft manifest.

    Raises CheckpointError, naming the cure, for anything that would make an answer wrong.
    """
    report = loading.report
    manifests = load_manifest(sft), load_manifest(reference)
    related = check_pair(*manifests, allow_unrelated=serving.allow_unrelated)
    models = [
        _model(role, folder, manifest, serving, loading)
        for role, folder, manifest in zip(ROLES, (sft, reference), manifests, strict=True)
    ]
    dtypes = [str(model.dtype).removeprefix("torch.") for model in models]
    tokenizer = load_tokenizer(files_folder(sft, manifests[0]))
    check_tokenizer(tokenizer, manifests[0], sft)
    how = loading.on_device(lambda: _how(models, serving, report))
    info = EngineInfo(
        sft=str(sft),
        reference=str(reference),
        revision=_revision(manifests, dtypes, serving),
        dtype=dtypes[0],
        device=serving.device,
        vocabulary=min(models[0].vocabulary, tokenizer.vocabulary),
        max_length_tokens=_max_length_tokens(models, serving, report),
        quantities=QUANTITIES,
        related=related,
    )
    engine = PairEngine(models[0], models[1], info, how)
    loading.on_device(lambda: prove(engine, *manifests, report=report))
    return engine, tokenizer, manifests[0]


def prove(engine: PairEngine, sft: Manifest, reference: Manifest, *, report: Report) -> None:
    """Compare the engine's log-probs with both stored probes. Raises CheckpointError on disagreement."""
    tolerance = PROBE_TOLERANCE_NATS[engine.info.dtype]
    for role, manifest in (("sft", sft), ("reference", reference)):
        stored = [response.logprobs for sequence in manifest.probe for response in sequence.responses]
        if not any(stored):
            raise CheckpointError(f"the manifest of {role} has an empty probe: adopt the checkpoint anew")
        served = [
            scores.sft_logprob_S if role == "sft" else scores.reference_logprob_S
            for branches in engine.score(probe_trunks(manifest), Wants())
            for scores in branches
        ]
        difference = np.concatenate(served) - np.concatenate([np.array(x) for x in stored])
        rms = float(np.sqrt(np.mean(difference**2)))
        report(f"probe of {role}: rms difference {rms:.2g} nats over {len(difference)} tokens (at most {tolerance})")
        if not rms <= tolerance:
            raise CheckpointError(
                f"{role} is computed wrong: its log-probs differ from the stored probe by {rms:.3g} nats (rms, at most "
                f"{tolerance} in {engine.info.dtype}): serve it with --dtype float32 to tell rounding from a wrong path"
            )


def probe_trunks(manifest: Manifest) -> list[Trunk]:
    """The prompts of a checkpoint's probe, each with its responses."""
    return [_probe_trunk(sequence.prompt_ids, [r.ids for r in sequence.responses]) for sequence in manifest.probe]


def _dtype(manifest: Manifest, serving: Serving, report: Report) -> str:
    """The dtype to serve in: a short one only where the processor computes in it, because it is emulated elsewhere."""
    if serving.dtype is not None or serving.device != "cpu":
        return serving.dtype or manifest.dtype
    supported = {
        "bfloat16": torch.ops.mkldnn._is_mkldnn_bf16_supported,
        "float16": torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }.get(manifest.dtype)
    if supported is None or supported():
        return manifest.dtype
    report(
        f"the {manifest.dtype} weights of {manifest.role} are served in float32, which holds them exactly: this "
        f"processor has no {manifest.dtype} arithmetic and emulates it slowly (--dtype {manifest.dtype} to have it so)"
    )
    return "float32"


def _model(role: str, folder: Path, manifest: Manifest, serving: Serving, loading: Loading) -> TorchModel:
    """A checkpoint's model, as it is to be served, its output layer on the sft model's device, where logits meet."""
    report = loading.report
    report(f"verifying the files of {role} ({folder})")
    verify_files(folder, manifest)
    dtype = _dtype(manifest, serving, report)
    device = serving.device if role == "sft" else serving.reference_device or serving.device

    def load() -> TorchModel:
        report(f"loading {role} in {dtype} on {device}")
        model = load_model(folder, manifest, dtype=dtype, device=device)
        if serving.norm_dtype is not None:
            model.use_norms(DTYPES[serving.norm_dtype])
        head_dtype = None if serving.head_dtype is None else DTYPES[serving.head_dtype]
        if head_dtype is not None or device != serving.device:
            model.use_head(device=torch.device(serving.device), dtype=head_dtype)
        return model

    served_as = dtype, device, serving.device, serving.head_dtype, serving.norm_dtype
    return loading.models.get((manifest.content_sha256, served_as), load)


def _how(models: Sequence[TorchModel], serving: Serving, report: Report) -> How:
    """Packed where both models allow it, and what a batch then needs; both are reported."""
    devices = serving.device, serving.reference_device or serving.device
    reasons = [
        obstacle(model.transformers_model, device=device, dtype=model.dtype)
        for model, device in zip(models, devices, strict=True)
    ]
    reason = next((found for found in reasons if found is not None), None)
    report("path: packed" if reason is None else f"path: padded, several times slower, because {reason}")
    if serving.deterministic:
        report("deterministic: each sequence is computed alone, its prompt too")
    sizes = [
        peak_bytes(
            model.transformers_model.config,
            tokens=serving.max_batch_tokens,
            itemsize=model.dtype.itemsize,
            cuda=device.startswith("cuda"),
        )
        for model, device in zip(models, devices, strict=True)
    ]
    weights = sum(model.weights_bytes for model in models)
    report(
        f"memory: weights {weights / 1e6:,.0f} MB; a batch of {serving.max_batch_tokens} tokens "
        f"{'up to' if reason is None else 'more than'} {max(sizes) / 1e6:,.0f} MB more (--max-batch-tokens)"
    )
    return How(serving.max_batch_tokens, packed=reason is None, alone=serving.deterministic)


def _max_length_tokens(models: Sequence[TorchModel], serving: Serving, report: Report) -> int:
    """What the models take and a batch holds: a longer sequence is refused at the door, so that memory is bounded."""
    longest = min(model.max_length_tokens for model in models)
    if longest > serving.max_batch_tokens:
        report(f"sequences of up to {serving.max_batch_tokens} of the models' {longest} tokens (--max-batch-tokens)")
    return min(longest, serving.max_batch_tokens)


def _revision(manifests: Sequence[Manifest], dtypes: Sequence[str], serving: Serving) -> str:
    """Of everything that a score depends on: all files of both, how they are served, and how text becomes ids."""
    facts: list[object] = [
        [m.content_sha256, dtype, m.renderer, m.end_of_turn_id] for m, dtype in zip(manifests, dtypes, strict=True)
    ]
    facts.append([serving.head_dtype, serving.norm_dtype, serving.deterministic])
    return sha256_of_text(json.dumps(facts))[:16]


def _probe_trunk(prompt_ids: Sequence[int], responses: Sequence[Sequence[int]]) -> Trunk:
    branches = tuple(Branch(np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=bool)) for ids in responses)
    return Trunk(np.array(prompt_ids, dtype=np.int32), branches)


def check_tokenizer(tokenizer: TransformersTokenizer, manifest: Manifest, folder: Path) -> None:
    if tokenizer.sha256() != manifest.tokenizer_sha256:
        raise CheckpointError(f"{folder}: its tokenizer is not the one of its manifest: adopt the checkpoint anew")
    if tokenizer.template_sha256(manifest.renderer) != manifest.template_sha256:
        raise CheckpointError(f"{folder}: its chat template is not the one of its manifest: adopt the checkpoint anew")
