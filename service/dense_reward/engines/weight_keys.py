"""Compares the weights that a model has with those that its files hold. A weight that is not loaded is random.

transformers and peft only warn about missing and unexpected weights. What they themselves declare ignorable is not in
their lists; everything else is refused here, with the likely cure.
"""

import re
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

from dense_reward.engines.weight_files import LAYER, wrapper_cure
from dense_reward.errors import CheckpointError

MAX_NAMED = 3
"""Weights of each kind that a message names."""
CONSTANTS = re.compile(
    r"(^|\.)(attn|attention|self_attn)\.(masked_bias|causal_mask)$"
    r"|(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$|(^|\.)position_ids$"
)
"""Constants that old versions of transformers saved with the weights; models compute them now."""
NEXT_TOKENS = re.compile(r"(^|\.)mtp(_\w+)?\.|\.(eh_proj|enorm|hnorm)\.")
"""Layers that predict several tokens at once, which causal log-probs do not use; some models give them numbers."""
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
OTHER_TOWERS = re.compile(r"(^|\.)(vision|visual|audio|image|multi_?modal|mm_|speech|talker|token2wav|code2wav)")
"""Parts of a multimodal checkpoint that its text model does not use."""
OTHER_HEADS = re.compile(
    r"(^|\.)(score|classifier|classification_head|v_head|value_head|reward_head|regression_head)\."
)
QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|weight_scale\w*|weight_packed|absmax|quant_map|weight\.(absmax|quant_\w+))$"
)
ADAPTED = re.compile(r"\.(lora_\w+|base_layer|modules_to_save|original_module)\.")
RESIZED_CURE = (
    "the vocabulary was resized after config.json was written, or config.json is of another model: copy both from one "
    "checkpoint"
)
SAVE_WHOLE_CURE = "copy config.json and weights from one checkpoint, or save the whole model again (save_pretrained)"

Mismatch = tuple[str, Sequence[int], Sequence[int]]
"""A weight's name, its shape in the files, and its shape in the model."""


@dataclass(frozen=True, slots=True)
class Keys:
    """Weights that the files lack, those that the model lacks, and those whose shapes differ."""

    missing: Set[str]
    unexpected: Set[str]
    mismatched: Sequence[Mismatch] = ()

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mismatched)


def refuse_wrong_keys(folder: Path, keys: Keys, config: PreTrainedConfig, *, text_of_multimodal: bool = False) -> None:
    """Raises CheckpointError if any weight is missing, unexpected or of another shape, with the likely cure.

    `text_of_multimodal`: the model is the text part of a checkpoint that holds towers of other modalities.
    """
    extra_layers = {layer for key in keys.unexpected if NEXT_TOKENS.search(key) and (layer := _layer(key))}
    unexpected = {
        key
        for key in keys.unexpected
        if not CONSTANTS.search(key) and not NEXT_TOKENS.search(key) and _layer(key) not in extra_layers
    }
    if text_of_multimodal:
        unexpected = {key for key in unexpected if not OTHER_TOWERS.search(key)}
    wrong = Keys(keys.missing, unexpected, keys.mismatched)
    if wrong:
        raise CheckpointError(f"{folder}: {_description(wrong)}: {_cure(wrong, config)}")


def refuse_other_dtypes(
    folder: Path, stored: Mapping[str, str], parameters: Collection[str], *, text_of_multimodal: bool = False
) -> None:
    """`stored`: the dtype of each tensor in the files. `parameters`: the names of those that the model learns.

    Raises CheckpointError if a parameter is stored as anything but floats: transformers would convert the numbers
    without a word. Constants, such as masks, can be of any dtype.
    """
    other = {name: dtype for name, dtype in stored.items() if dtype not in FLOATS}
    if text_of_multimodal:
        other = {name: dtype for name, dtype in other.items() if not OTHER_TOWERS.search(name)}
    wrong = [
        f"{name} {dtype}"
        for name, dtype in other.items()
        if name.endswith(".weight") or any(_same_weight(name, parameter) for parameter in parameters)
    ]
    if wrong:
        raise CheckpointError(
            f"{folder}: {_counted(wrong)} not stored as floats ({_named(wrong)}): they are quantised, or converted "
            "by mistake, so use the checkpoint with its float weights"
        )


def refuse_wrong_adapter_keys(folder: Path, keys: Keys) -> None:
    """The same for a LoRA adapter's weights, as peft reports them."""
    if not keys:
        return
    cure = wrapper_cure({*keys.unexpected}) or (
        "the adapter was trained on another base model (other layers or names): name its own base in "
        "adapter_config.json"
        if keys.unexpected
        else "the adapter was not saved completely, or adapter_config.json is of another one: copy or save it again"
    )
    raise CheckpointError(f"{folder}: {_description(keys)}: {cure}")


def _same_weight(name: str, parameter: str) -> bool:
    """Whether a name in the files is a parameter's, with or without the model's prefix."""
    return name == parameter or parameter.endswith(f".{name}") or name.endswith(f".{parameter}")


def _layer(key: str) -> str | None:
    """The part of a name up to and with its layer's number; None if it is in no layer."""
    match = LAYER.search(key)
    return None if match is None else key[: match.end()]


def _description(keys: Keys) -> str:
    parts = []
    if keys.missing:
        parts.append(f"{_counted(keys.missing)} of the model missing from its files ({_named(keys.missing)})")
    if keys.unexpected:
        parts.append(f"{_counted(keys.unexpected)} in its files that the model lacks ({_named(keys.unexpected)})")
    if keys.mismatched:
        shapes = [f"{name} {[*stored]} instead of {[*own]}" for name, stored, own in sorted(keys.mismatched)]
        parts.append(f"{_counted(shapes)} with another shape than config.json states ({_named(shapes)})")
    return "; ".join(parts)


def _counted(names: Collection[str]) -> str:
    return "1 weight" if len(names) == 1 else f"{len(names)} weights"


def _named(names: Collection[str]) -> str:
    more = ["..."] if len(names) > MAX_NAMED else []
    return ", ".join([*sorted(names)[:MAX_NAMED], *more])


def _cure(keys: Keys, config: PreTrainedConfig) -> str:
    """The likely cause and its cure, by the kinds of names."""
    return (
        wrapper_cure({*keys.unexpected})
        or _saved_otherwise(keys)
        or _prefix(keys)
        or _head(keys)
        or _layers(keys, config)
        or _biases(keys)
        or _shapes(keys)
        or SAVE_WHOLE_CURE
    )


def _saved_otherwise(keys: Keys) -> str | None:
    if any(ADAPTED.search(key) for key in keys.unexpected):
        return "an adapter was saved inside the model: merge it first (merge_and_unload), and save the merged model"
    if any(QUANTISED.search(key) for key in keys.unexpected):
        return "the weights are quantised, but config.json does not say so: use the unquantised checkpoint"
    return None


def _prefix(keys: Keys) -> str | None:
    """A prefix that the files put before names of the model, or that they lack."""
    for key in sorted(keys.missing):
        longer = next((other for other in sorted(keys.unexpected) if other.endswith(f".{key}")), None)
        if longer is not None:
            return f"the files put {longer.removesuffix(key)!r} before the names: strip it"
        shorter = next((other for other in sorted(keys.unexpected) if key.endswith(f".{other}")), None)
        if shorter is not None:
            return f"the names in the files lack {key.removesuffix(shorter)!r}: save the causal language model itself"
    return None


def _head(keys: Keys) -> str | None:
    if any(OTHER_HEADS.search(key) for key in keys.unexpected):
        return (
            "this is a reward, value or classification model, not a causal language model: give the checkpoint that it "
            "was made from, or save the causal language model without this head"
        )
    if keys.missing and all(re.search(r"(lm_head|embed_out|output)\.(weight|bias)$", key) for key in keys.missing):
        return (
            "the backbone was saved (AutoModel), without its output layer: save the causal language model "
            "(AutoModelForCausalLM). If the output layer is the embedding, set tie_word_embeddings in config.json"
        )
    return None


def _layers(keys: Keys, config: PreTrainedConfig) -> str | None:
    stated = getattr(config.get_text_config(), "num_hidden_layers", None)
    found = {int(match[2]) for key in keys.unexpected if (match := LAYER.search(key))}
    if stated is not None and any(layer >= stated for layer in found):
        return f"config.json states {stated} layers, but the files hold more: copy both from one checkpoint"
    missing = [match for key in keys.missing if (match := LAYER.search(key))]
    last = max((int(match[2]) for match in missing), default=-1)
    kinds = {match.string[match.end() :] for match in missing}
    whole = {match.string[match.end() :] for match in missing if int(match[2]) == last}
    if stated is not None and last == stated - 1 and len(whole) > 1 and whole == kinds and not keys.unexpected:
        held = min(int(match[2]) for match in missing)
        if held:
            return f"config.json states {stated} layers, but the files hold {held}: copy both from one checkpoint"
    return None


def _biases(keys: Keys) -> str | None:
    if keys.mismatched or not all(key.endswith(".bias") for key in {*keys.missing, *keys.unexpected}):
        return None
    said, held = ("without", "have") if keys.unexpected else ("with", "lack")
    return (
        f"config.json describes a model {said} these biases (attention_bias, mlp_bias), but the files {held} "
        "them: copy both from one checkpoint"
    )


def _shapes(keys: Keys) -> str | None:
    vocabulary = [re.search(r"embed|wte|lm_head|embed_out", name) is not None for name, _, _ in keys.mismatched]
    columns_equal = [[*stored[1:]] == [*own[1:]] for _, stored, own in keys.mismatched]
    if vocabulary and all(vocabulary) and all(columns_equal):
        return RESIZED_CURE
    return None
