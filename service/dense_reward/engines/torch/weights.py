"""A checkpoint's files -> a transformers model. Service and trainer load weights only here.

Each weight must come from the files: one that does not would be random, and no later check could tell.
"""

import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from dense_reward.engines.torch.architecture import INVALID, first_line, load_config, quantisation
from dense_reward.engines.torch.memory import free_bytes, own_copy
from dense_reward.engines.trial.adapter import check_adapter_config
from dense_reward.engines.weight_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX,
    WEIGHTS,
    check_files,
    check_weights_exist,
    model_files,
    read_json,
    stored_in,
    tensors_of,
    weights_of,
)
from dense_reward.engines.weight_keys import Keys, refuse_other_dtypes, refuse_wrong_adapter_keys, refuse_wrong_keys
from dense_reward.errors import CheckpointError
from dense_reward.manifest import Manifest, adapter_base_folder, files_folder

if TYPE_CHECKING:
    from peft import PeftModel

UNLOADABLE = (*INVALID, MemoryError, SafetensorError, re.error)
"""What transformers, peft and safetensors raise for files that they cannot load."""
ADAPTER = "default"
MakeRoom = Callable[[], object]
"""Frees what earlier models left. It is called before weights take memory, once all cheaper checks have passed."""
UNMERGEABLE = frozenset({"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE", "CPT"})
"""Kinds of adapters of peft that put learned inputs before the text."""
HEAD_WEIGHT = "score.weight"
"""The output layer of transformers' models for sequence classification."""
ORDINARY_LAYERS = 200
"""Layers that can be made, to see which of their weights are missing."""
MOST_UNSTORED, SMALL_NUMBERS = 1.5, 4_000_000
"""A model may have this many times the numbers of its files, and this many more: an output layer can be missing."""
INCOMPLETE_PARTS = "weights that it joins, as those of a layer's experts, are incomplete or differ in shape"


def weight_folders(folder: Path, manifest: Manifest) -> tuple[Path, Path]:
    """The folders of a checkpoint's own files and of its weights: an adapter's base model, or the same folder."""
    files = files_folder(folder, manifest)
    return files, adapter_base_folder(folder, manifest) or files


def no_room_needed() -> None:
    """The MakeRoom of a process that loads no pair beside others."""


def load_weights(
    files: Path,
    base: Path,
    dtype: torch.dtype,
    *,
    head: bool = False,
    device: str | None = None,
    make_room: MakeRoom = no_room_needed,
) -> PreTrainedModel:
    """A causal language model from local safetensors. If `base` is another folder, `files` is an adapter to it.

    `head`: instead, a decoder with one linear output (sequence classification with one label). No remote code.
    `device`: where it is served. On a CPU it gets memory of its own: what transformers loads is the file itself, mapped
    into memory, so a later write to the file would change what is served, or end the process. Raises
    CheckpointError, with the cure, if transformers cannot load the files, if any weight is missing, unexpected, of
    another shape or not finite, if the memory is too small, or if the service cannot compute such a model.
    """
    try:
        if base != files or (files / ADAPTER_CONFIG).is_file():
            _check_adapter(files, base)
        if head:
            _check_has_head(files, base)
        kind = AutoModelForSequenceClassification if head else AutoModelForCausalLM
        model = _load_model(base, dtype, kind, make_room, in_memory=device == "cpu")
        if base != files:
            model = _merge_adapter(model, files, base)
    except ImportError as error:
        cure = (
            first_line(error) if error.name is None else f"loading it needs the Python module {error.name}: install it"
        )
        raise CheckpointError(f"{files}: {cure}") from error
    except UNLOADABLE as error:
        reason = INCOMPLETE_PARTS if "automatic conversion" in str(error) else first_line(error)
        raise CheckpointError(
            f"{files}: transformers cannot load it ({reason}): copy or save the checkpoint again"
        ) from error
    _refuse_not_finite(model, files)
    return model if device is None else _on_device(model, device)


def _on_device(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """The model on its device, where none of it is a mapped file."""
    if device == "cpu":
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = own_copy(tensor.data)
    moved: PreTrainedModel = model.to(device)
    return moved


def _check_has_head(files: Path, base: Path) -> None:
    """Raises CheckpointError unless the files are a whole model with a layer `score`."""
    if base != files or (files / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{files} is an adapter: merge it into its base with its head (merge_and_unload), and save the whole model"
        )
    check_files(files)
    check_weights_exist(files)
    if HEAD_WEIGHT not in weights_of(files):
        raise CheckpointError(
            f"{files} has no scalar head ({HEAD_WEIGHT}), so it is no reward model: serve it in a pair, or train "
            "a head on it (dense-reward-train rft)"
        )


def _load_model(
    folder: Path,
    dtype: torch.dtype,
    kind: type[AutoModelForCausalLM] | type[AutoModelForSequenceClassification],
    make_room: MakeRoom,
    *,
    in_memory: bool,
) -> PreTrainedModel:
    config = load_config(folder)
    check_weights_exist(folder)
    numbers = _check_size(folder, config, kind)
    make_room()
    if in_memory and 0 < free_bytes() < numbers * dtype.itemsize:
        raise CheckpointError(
            f"{folder}: its weights take {numbers * dtype.itemsize / 1e9:.1f} GB in {_name(dtype)}, but only "
            f"{free_bytes() / 1e9:.1f} GB of memory are free: give the service more memory, or stop serving other pairs"
        )
    with _quiet_load_report():
        model, info = kind.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=plain_attention(config),
            experts_implementation="eager" if dtype is torch.float64 else None,  # grouped matmuls lack float64
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    keys = Keys(info["missing_keys"], info["unexpected_keys"], [*info["mismatched_keys"]])
    text_of_multimodal = type(model.config) is not type(config)
    refuse_wrong_keys(folder, keys, model.config, text_of_multimodal=text_of_multimodal)
    if quantisation(config) is None:  # else transformers has turned blocks of integers into floats
        names = [name for name, _ in model.named_parameters()]
        refuse_other_dtypes(folder, weights_of(folder), names, text_of_multimodal=text_of_multimodal)
    return model


def _check_size(
    folder: Path,
    config: PreTrainedConfig,
    kind: type[AutoModelForCausalLM] | type[AutoModelForSequenceClassification],
) -> int:
    """How many numbers the model of a configuration has, counted without memory for them.

    Raises CheckpointError if that is far more than the files hold. What differs by less is refused by name after
    loading, with a better reason.
    """
    stored = stored_in(model_files(folder))
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > max(stored.tensors, ORDINARY_LAYERS):
        raise CheckpointError(
            f"{folder}: config.json states {layers} layers, but the files hold {stored.tensors} weights: copy both "
            "from one checkpoint"
        )
    with torch.device("meta"):
        model = kind.from_config(config, trust_remote_code=False)
    numbers: int = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    packed = 2 * stored.bytes if quantisation(config) else stored.numbers
    if numbers > MOST_UNSTORED * packed + SMALL_NUMBERS:
        raise CheckpointError(
            f"{folder}: config.json describes a model of {numbers:,} numbers, but the files hold {stored.numbers:,}: "
            "copy both from one checkpoint"
        )
    return numbers


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_adapter(files: Path, base: Path) -> None:
    """Raises CheckpointError for an adapter that is not whole or not plain, before its base is loaded."""
    if base == files or (base / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{base} holds an {ADAPTER_CONFIG}, so transformers would add that adapter to the model: move it to a "
            "folder of its own, or adopt the checkpoint again"
        )
    check_files(files)
    _check_kind(files)
    if not (files / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(
            f"{files} has no {ADAPTER_WEIGHTS}, the adapter's weights: copy or save the adapter again"
        )
    check_adapter_config(files, base)


def _merge_adapter(model: PreTrainedModel, files: Path, base: Path) -> PreTrainedModel:
    """The model with an adapter merged into it."""
    from peft import PeftModel  # noqa: PLC0415 - only adapters need peft

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # refused below, with all their names
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft reads it
        try:
            adapted = PeftModel.from_pretrained(model, files, adapter_name=ADAPTER)
            found = adapted.load_adapter(files, ADAPTER)  # once more, for what peft returns only here
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"{files}: {_misfit(error, files, base)}") from error
        except ValueError as error:
            raise CheckpointError(
                f"{files}: peft cannot apply this adapter to {base} ({first_line(error)}): name the model that the "
                f"adapter was trained on in {ADAPTER_CONFIG} (base_model_name_or_path)"
            ) from error
    stored = tensors_of(files / ADAPTER_WEIGHTS)
    refuse_other_dtypes(files, stored, stored)
    refuse_wrong_adapter_keys(files, Keys({*found.missing_keys}, {*found.unexpected_keys}))
    return _merged(adapted, files)


def _check_kind(files: Path) -> None:
    """Raises CheckpointError for an adapter of a kind that peft does not know, or that is part of no weight."""
    from peft import PeftType  # noqa: PLC0415 - only adapters need peft

    kind = read_json(files / ADAPTER_CONFIG).get("peft_type")
    if kind not in {*map(str, PeftType.__members__)}:
        raise CheckpointError(
            f"{files / ADAPTER_CONFIG} has the peft_type {kind!r}, which the installed peft does not know: correct it, "
            "or install a newer peft"
        )
    if kind in UNMERGEABLE:
        raise CheckpointError(_cannot_be_merged(files, str(kind), "it changes what the model reads, not its weights"))
    if (files / WEIGHTS).is_file() or (files / INDEX).is_file():
        raise CheckpointError(
            f"{files} holds an adapter and a whole model: move one of them to a folder of its own, so that it is clear "
            "which is meant and no adapter is added twice"
        )


def _merged(adapted: "PeftModel", files: Path) -> PreTrainedModel:
    """Raises CheckpointError if this kind of adapter cannot be merged into its base."""
    kind = read_json(files / ADAPTER_CONFIG).get("peft_type")
    if not hasattr(adapted, "merge_and_unload"):
        reason = "it has no weights to merge"
    else:
        try:
            merged: PreTrainedModel = adapted.merge_and_unload()
        except UNLOADABLE as error:
            reason = first_line(error)
        else:
            return merged
    raise CheckpointError(_cannot_be_merged(files, str(kind), reason))


def _cannot_be_merged(files: Path, kind: str, reason: str) -> str:
    return (
        f"{files} is an adapter of type {kind}, which cannot be merged into its base ({reason}): only adapters that "
        "can, as LoRA, are loaded, so train one of those, or fine-tune the whole model"
    )


def _misfit(error: Exception, files: Path, base: Path) -> str:
    """Why an adapter's weights do not fit its base: peft raises RuntimeError for shapes and KeyError for names."""
    if isinstance(error, KeyError):
        return (
            f"{ADAPTER_CONFIG} lists a module to save whose weights ({error.args[0]}) are not in {ADAPTER_WEIGHTS}: "
            "copy or save the adapter again"
        )
    if "size mismatch" not in str(error):
        return f"peft cannot load it ({first_line(error)}): copy or save the adapter again"
    shapes = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), "")
    if any(name in shapes for name in ("embed", "lm_head", "wte")):
        return (
            f"the adapter was trained on a resized vocabulary ({shapes}): resize the base model to it (save {base} "
            "after resize_token_embeddings, with the adapter's tokenizer), or merge the adapter where it was trained "
            "and adopt the merged model"
        )
    return f"the adapter was trained on a model of other sizes ({shapes}): name its own base in {ADAPTER_CONFIG}"


def _refuse_not_finite(model: PreTrainedModel, files: Path) -> None:
    """Raises CheckpointError if a weight is NaN or infinite: the probe sees only the rows that it uses."""
    broken = [name for name, weight in model.named_parameters() if weight.numel() and not _is_finite(weight)]
    if broken:
        raise CheckpointError(
            f"{files}: {len(broken)} of its weights hold NaN or infinity ({', '.join(broken[:3])}): the training "
            "diverged or a copy is broken, so use an earlier checkpoint or copy it again"
        )


def _is_finite(weight: torch.Tensor) -> bool:
    """By its extremes, which are NaN if any element is: much faster than isfinite of every element."""
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(weight.detach()))


@contextmanager
def _quiet_load_report() -> Iterator[None]:
    """Without transformers' table of missing and unexpected weights: those that matter are refused in words.

    Without its progress bar too, unless a terminal shows it: between the lines of a log it is none of their format.
    """
    has_bar = is_progress_bar_enabled() and not sys.stderr.isatty()
    if has_bar:
        disable_progress_bar()
    logger = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
        if has_bar:
            enable_progress_bar()


def plain_attention(config: PreTrainedConfig) -> str | None:
    """eager if attention scores are soft-capped: sdpa has no caps, and some versions drop them silently."""
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None else None


def stored_dtype(folder: Path) -> str:
    """The dtype in a checkpoint's configuration; float32 if it has none. Raises CheckpointError."""
    return str(getattr(load_config(folder), "dtype", None) or torch.float32).removeprefix("torch.")


def equal_weights(one: PreTrainedModel, another: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Whether two models have bitwise equal weights once they are rounded to a dtype. Stops at the first difference."""
    if one is another:
        return True
    weights, others = _weights_of(one), _weights_of(another)
    if weights.keys() != others.keys():
        return False
    return all(_equal(weight, others[name], dtype) for name, weight in weights.items())


def _weights_of(model: PreTrainedModel) -> Mapping[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=True))


def _equal(weight: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> bool:
    if weight.shape != other.shape:
        return False
    return torch.equal(weight.to(dtype), other.to(device=weight.device, dtype=dtype))
