"""Two checkpoints on disk -> a verified PairEngine: they belong together, and it reproduces their probes."""

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
import torch
from transformers import PreTrainedModel

from dense_reward.engines.kernels import compiled
from dense_reward.engines.kernels.fused_sums import cannot_fuse
from dense_reward.engines.proof import (
    ROLES,
    Checkpoint,
    check_probe,
    encoder_of,
    pair_info,
    probe_trunks,
    report_template,
    tokenizer_of,
    verify_probe,
)
from dense_reward.engines.tokenizer import TransformersTokenizer
from dense_reward.engines.torch.architecture import load_config
from dense_reward.engines.torch.device import CPU_CAPABILITIES, chosen_device, computes_in
from dense_reward.engines.torch.memory import free_bytes, hold_once, peak_bytes, stored_bytes
from dense_reward.engines.torch.model import DTYPES, TorchModel, load_model, longest_sequence
from dense_reward.engines.torch.packing_check import unsupported_reason
from dense_reward.engines.torch.pair import QUANTITIES, ComputeOptions, PairEngine
from dense_reward.engines.torch.probe_mismatch import mismatch_cure
from dense_reward.engines.torch.shared_layers import layers_computed_once
from dense_reward.engines.torch.weights import MakeRoom, equal_weights, no_room_needed, weight_folders
from dense_reward.engines.weight_files import check_files
from dense_reward.errors import CheckpointError
from dense_reward.hashed_files import Stamps, refuse_changed, stamps_of
from dense_reward.manifest import EQUAL_MODELS, Manifest, check_files_folder, check_pair, load_manifest, verify_files
from dense_reward.records import OnDevice, Report, Result, Wants
from dense_reward.settings import Settings
from dense_reward.text.encode import Encoder

SHORT_PROBE_TOKENS = 1_024
"""A probe may have sequences of this length whatever a batch holds."""
LEAST_COMPILED = 10_000_000
"""Weights of a model for which compiling kernels is worth its time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingOptions:
    """How to serve a pair. `dtype` None: the checkpoint's own, or float32 if the processor does not compute in it."""

    dtype: str | None = None
    head_dtype: str | None = None
    norm_dtype: str | None = None
    device: str = "cpu"
    reference_device: str | None = None
    max_batch_tokens: int
    deterministic: bool = False
    allow_unrelated: bool = False
    pack_weights: bool = False
    compile_kernels: bool = False


class LoadedModels:
    """The models and tokenizers in use, keyed by all that their results depend on.

    The references are weak: a model is freed with the last pair that uses it.
    """

    def __init__(self) -> None:
        self._tokenizers: WeakValueDictionary[Hashable, TransformersTokenizer] = WeakValueDictionary()
        self._models: WeakValueDictionary[Hashable, TorchModel] = WeakValueDictionary()

    def get(self, key: Hashable, load: Callable[[], TorchModel]) -> TorchModel:
        """The model of a key, loaded if no pair uses it now."""
        model = self._models.get(key)
        if model is None:
            model = self._models[key] = load()
        return model

    def tokenizer(self, folder: Path, manifest: Manifest) -> TransformersTokenizer:
        """As `tokenizer_of`. A large one stops all other threads while it is read, so one in use is not read again."""
        facts = manifest.tokenizer_sha256, manifest.renderer, manifest.template_sha256, str(manifest.choices)
        key = (*facts, *((n, digest) for n, digest in manifest.files.items() if not n.endswith(".safetensors")))
        found = self._tokenizers.get(key)
        if found is None:
            found = self._tokenizers[key] = tokenizer_of(folder, manifest)
        return found

    @property
    def in_use(self) -> list[TorchModel]:
        return list(self._models.values())


def _call_directly(call: Callable[[], Result]) -> Result:
    return call()


@dataclass(frozen=True, slots=True)
class LoadContext:
    """What loading needs in addition to the checkpoints: where steps are reported, the device, the loaded models."""

    report: Report
    on_device: OnDevice = _call_directly
    models: LoadedModels = field(default_factory=LoadedModels)
    make_room: MakeRoom = no_room_needed


def load_pair(
    sft: Path, reference: Path, serving: ServingOptions, context: LoadContext
) -> tuple[PairEngine, TransformersTokenizer, Manifest]:
    """Load two checkpoints, verify them, and return engine, tokenizer and the sft manifest.

    Raises CheckpointError, with the cure, for anything that would make a score wrong.
    """
    report = context.report
    manifests = load_manifest(sft), load_manifest(reference)
    related = check_pair(*manifests, allow_unrelated=serving.allow_unrelated)
    before = verified((sft, reference), manifests, serving, report)
    tokenizer = context.models.tokenizer(sft, manifests[0])
    models = [
        _model(role, folder, manifest, serving, context)
        for role, folder, manifest in zip(ROLES, (sft, reference), manifests, strict=True)
    ]
    context.on_device(lambda: _refuse_equal(models, manifests))
    checkpoints = [
        Checkpoint(role, folder, manifest, str(model.dtype).removeprefix("torch."))
        for role, folder, manifest, model in zip(ROLES, (sft, reference), manifests, models, strict=True)
    ]
    _report_two_dtypes(checkpoints, report)
    refuse_changed(before)
    options, shared_layers = context.on_device(lambda: _compute_options(models, serving, report))
    info = pair_info(
        checkpoints,
        options=[serving.head_dtype, serving.norm_dtype, serving.deterministic],
        device=serving.device,
        vocab_size=min(models[0].vocab_size, tokenizer.vocab_size),
        max_length_tokens=_max_length_tokens(models, serving, report),
        quantities=QUANTITIES,
        related=related,
    )
    engine = PairEngine(models[0], models[1], info, options, shared_layers=shared_layers)
    context.on_device(lambda: _verify_probes(engine, checkpoints, report))
    return engine, tokenizer, manifests[0]


def verified(folders: Sequence[Path], manifests: Sequence[Manifest], serving: ServingOptions, report: Report) -> Stamps:
    """Verify the files of checkpoints, what is seen quickly first; what tells whether they are changed from now on.

    Raises CheckpointError, before any weights are loaded.
    """
    places = [weight_folders(folder, manifest) for folder, manifest in zip(folders, manifests, strict=True)]
    for folder, manifest, (files, base) in zip(folders, manifests, places, strict=True):
        check_files_folder(files, folder)
        check_files_folder(base, folder)
        check_files(files)
        config = load_config(base)
        longest = min(longest_sequence(config), max(serving.max_batch_tokens, SHORT_PROBE_TOKENS))
        check_probe(folder, manifest, vocabulary=int(config.get_text_config().vocab_size), longest=longest)
    before = stamps_of(*dict.fromkeys(place for pair in places for place in pair))
    for folder, manifest in zip(folders, manifests, strict=True):
        report(f"verifying the files of {manifest.role} ({folder})")
        verify_files(folder, manifest)
    return before


def _refuse_equal(models: Sequence[TorchModel], manifests: Sequence[Manifest]) -> None:
    """Raises CheckpointError if both have the same weights, also if their dtypes differ."""
    stored = [DTYPES[manifest.dtype] for manifest in manifests if manifest.dtype in DTYPES]
    shortest = min([*stored, *(model.dtype for model in models)], key=lambda dtype: dtype.itemsize)
    if equal_weights(models[0].transformers_model, models[1].transformers_model, shortest):
        raise CheckpointError(EQUAL_MODELS)


def _report_two_dtypes(checkpoints: Sequence[Checkpoint], report: Report) -> None:
    """The rounding errors of two dtypes do not cancel in a reward, as those of one dtype do in part."""
    sft, reference = (checkpoint.dtype for checkpoint in checkpoints)
    if sft != reference:
        report(
            f"sft is computed in {sft}, the reference in {reference}: this adds rounding noise to the rewards (one "
            "dtype for both: --dtype)"
        )


def _verify_probes(engine: PairEngine, checkpoints: Sequence[Checkpoint], report: Report) -> None:
    """Compare the engine's log-probs with both stored probes. Raises CheckpointError if they disagree."""
    for checkpoint, model in zip(checkpoints, engine.models, strict=True):
        served = [
            scores.sft_logprob_S if checkpoint.role == "sft" else scores.reference_logprob_S
            for branches in engine.score(probe_trunks(checkpoint.manifest), Wants())
            for scores in branches
        ]
        cure = partial(mismatch_cure, model, checkpoint)
        verify_probe(checkpoint.role, np.concatenate(served), checkpoint, cure=cure, report=report)


def served_dtype(manifest: Manifest, serving: ServingOptions, report: Report) -> str:
    """The dtype to serve in. The checkpoint's own, except on a CPU that would emulate its arithmetic."""
    if serving.dtype is not None or serving.device != "cpu":
        return serving.dtype or manifest.dtype
    if manifest.dtype not in CPU_CAPABILITIES or computes_in(manifest.dtype):
        return manifest.dtype
    report(
        f"the {manifest.dtype} weights of {manifest.role} are served in float32, which holds them exactly: this "
        f"processor has no {manifest.dtype} arithmetic and emulates it slowly (to do so: --dtype {manifest.dtype})"
    )
    return "float32"


def _model(role: str, folder: Path, manifest: Manifest, serving: ServingOptions, context: LoadContext) -> TorchModel:
    """A checkpoint's model as `serving` requires, with its output layer on the sft model's device."""
    report = context.report
    dtype = served_dtype(manifest, serving, report)
    device = serving.device if role == "sft" else serving.reference_device or serving.device

    def load() -> TorchModel:
        report(f"loading {role} in {dtype} on {device}")
        compiling = partial(_compile_kernels, serving, report)
        model = load_model(
            folder, manifest, dtype=dtype, device=device, compile_for=compiling, make_room=context.make_room
        )
        if serving.norm_dtype is not None:
            model.use_norms(DTYPES[serving.norm_dtype])
        head_dtype = None if serving.head_dtype is None else DTYPES[serving.head_dtype]
        # The logits of both models are compared tile by tile, so both heads must be on one device.
        if head_dtype is not None or device != serving.device:
            model.use_head(device=torch.device(serving.device), dtype=head_dtype)
        context.on_device(lambda: _hold_once(role, model, context))
        if serving.pack_weights and device == "cpu":
            packed = context.on_device(lambda: model.pack_weights(at_most_bytes=free_bytes() / 2))
            if packed is not None:
                report(f"weights: {packed} (--no-pack-weights)")
        return model

    # All that changes the loaded model: pairs that differ in one of these must not share it.
    dtypes = dtype, serving.head_dtype, serving.norm_dtype
    served_as = dtypes, device, serving.device, serving.pack_weights, serving.compile_kernels
    return context.models.get((manifest.content_sha256, served_as), load)


def _compile_kernels(serving: ServingOptions, report: Report, model: PreTrainedModel) -> bool:
    """Compile the kernels of a CPU for a model that is large enough, unless they are; reports why if they are not."""
    if not serving.compile_kernels or model.num_parameters() < LEAST_COMPILED:
        return False
    dtypes = dict.fromkeys([model.dtype, model.dtype if serving.head_dtype is None else DTYPES[serving.head_dtype]])
    if not all(map(compiled.is_started, dtypes)):
        report("kernels: compiling (--no-compile-kernels)")
    for dtype in dtypes:
        reason = compiled.start(dtype)
        if reason is not None:
            report(f"kernels: not compiled for {str(dtype).removeprefix('torch.')}, because {reason}: torch computes")
    return compiled.is_started(model.dtype)


def _hold_once(role: str, model: TorchModel, context: LoadContext) -> None:
    """Let a new model use the weights of the models in use that equal its own."""
    saved = hold_once(model.weights, [other.weights for other in context.models.in_use])
    if saved:
        context.report(f"weights: {saved / 1e6:,.0f} MB of {role} are equal to those of a loaded model and held once")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # else the bytes stay reserved, and are reported as used


def _compute_options(
    models: Sequence[TorchModel], serving: ServingOptions, report: Report
) -> tuple[ComputeOptions, int]:
    """How to compute the pair: packed if both models can be; and the number of layers to compute once.

    Reports the path and the memory of a batch.
    """
    devices = serving.device, serving.reference_device or serving.device
    reasons = [
        unsupported_reason(model.transformers_model, device=device, dtype=model.dtype)
        for model, device in zip(models, devices, strict=True)
    ]
    reason = next((reason for reason in reasons if reason is not None), None)
    report("path: packed" if reason is None else f"path: padded, several times slower, because {reason}")
    if serving.deterministic:
        report("deterministic: each sequence is computed alone, its prompt too")
    shared_layers = layers_computed_once(models, report, packed=reason is None)
    if reason is None and not serving.deterministic:
        _record_graphs(models, report)
    sizes = [
        peak_bytes(
            model.transformers_model.config,
            tokens=serving.max_batch_tokens,
            itemsize=model.dtype.itemsize,
            cuda=device.startswith("cuda"),
        )
        for model, device in zip(models, devices, strict=True)
    ]
    weights = stored_bytes(weight for model in models for weight in model.weights.values())
    report(
        f"memory: weights {weights / 1e6:,.0f} MB; a batch of {serving.max_batch_tokens} tokens "
        f"{'up to' if reason is None else 'more than'} {max(sizes) / 1e6:,.0f} MB more (--max-batch-tokens)"
    )
    options = ComputeOptions(serving.max_batch_tokens, packed=reason is None, alone=serving.deterministic)
    return options, shared_layers


def _record_graphs(models: Sequence[TorchModel], report: Report) -> None:
    for model in dict.fromkeys(models):
        if model.device.type == "cuda" and not model.has_graphs:  # another pair may have had them recorded
            reason = cannot_fuse(model.device, model.dtype)
            fused = "no Triton kernels: " + reason if reason else ", ".join(model.fused) or "none"
            report(f"fused layers on {model.device}: {fused}")
            report(f"CUDA graphs: {model.record_graphs()}")


def _max_length_tokens(models: Sequence[TorchModel], serving: ServingOptions, report: Report) -> int:
    """The longest sequence that both models accept and a batch holds. Longer ones are refused, which bounds memory."""
    longest = min(model.max_length_tokens for model in models)
    if longest > serving.max_batch_tokens:
        report(f"sequences of up to {serving.max_batch_tokens} of the models' {longest} tokens (--max-batch-tokens)")
    return min(longest, serving.max_batch_tokens)


class DeviceLoader:
    """Loads pairs one after another. A checkpoint that is already in use is not loaded again."""

    def __init__(self, make_room: MakeRoom = no_room_needed) -> None:
        self._models = LoadedModels()
        self._make_room = make_room
        self._warned = False

    def context(self, report: Report, on_device: OnDevice) -> LoadContext:
        return LoadContext(report, on_device, self._models, self._make_room)

    def load(self, settings: Settings, report: Report, on_device: OnDevice) -> tuple[PairEngine, Encoder, str]:
        """Engine, encoder and tokenizer hash of the pair in the settings. Raises CheckpointError with the cure."""
        if settings.sft is None or settings.reference is None:
            raise CheckpointError("give both checkpoints: --sft DIR --reference DIR")
        serving = self.serving(settings)
        context = self.context(report, on_device)
        engine, tokenizer, manifest = load_pair(settings.sft, settings.reference, serving, context)
        encoder = encoder_of(tokenizer, manifest, settings.sft)
        report_template(encoder, tokenizer, manifest, report)
        return engine, encoder, manifest.tokenizer_sha256

    def serving(self, settings: Settings) -> ServingOptions:
        """See `serving_options`; warns once if that is the CPU."""
        serving = serving_options(settings)
        self.warn_of_cpu(serving.device, settings.device)
        return serving

    def warn_of_cpu(self, device: str, setting: str) -> None:
        """Warn once in the life of a service."""
        if device == "cpu" and not self._warned:
            why = "--device auto found no GPU" if setting == "auto" else "--device cpu"
            logging.getLogger("dense_reward").warning("models run on the CPU, much slower than on a GPU (%s)", why)
            self._warned = True


def gpu_bytes() -> dict[str, int]:
    """Bytes that torch holds on each GPU, including the cache that it keeps for later batches."""
    return {f"cuda:{at}": torch.cuda.memory_reserved(at) for at in range(torch.cuda.device_count())}


def serving_options(settings: Settings) -> ServingOptions:
    """How to serve, with `auto` resolved to a device. Sets torch's threads and determinism for the whole process.

    Raises CheckpointError if torch sees no such device.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = chosen_device(settings.device)
    torch.use_deterministic_algorithms(settings.deterministic)
    return ServingOptions(
        dtype=settings.dtype,
        head_dtype=settings.head_dtype,
        norm_dtype=settings.norm_dtype,
        device=device,
        reference_device=None if settings.reference_device is None else chosen_device(settings.reference_device),
        max_batch_tokens=settings.max_batch_tokens,
        deterministic=settings.deterministic,
        allow_unrelated=settings.allow_unrelated,
        # which matmul is faster is measured at each start, so not every start rounds alike
        pack_weights=settings.pack_weights and not settings.deterministic,
        compile_kernels=settings.compile_kernels and not settings.deterministic,
    )
