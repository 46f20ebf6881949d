"""A checkpoint's config.json -> a configuration of transformers that this service can compute, or a refusal."""

from pathlib import Path

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dense_reward.engines.weight_files import CONFIG, check_files, read_json
from dense_reward.errors import CheckpointError

INVALID = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError),
    StrictDataclassError,
)
"""What transformers raises for a configuration that it cannot use."""
COMPUTED_AS_FLOATS = frozenset({"mxfp4"})
"""Quantisations whose weights transformers turns back into floats while it loads them."""
CAUSAL_WITHOUT_SAYING = frozenset({"gpt_neox", "gpt_neox_japanese"})
"""Decoders whose configurations say `is_decoder: false`."""
LARGEST_SIZES = {
    "vocab_size": 10_000_000,
    "hidden_size": 1_000_000,
    "num_hidden_layers": 10_000,
    "max_position_embeddings": 1 << 40,
}
"""Far above any model: a configuration beyond these is broken, and making such a model would fill the memory."""
OTHER_INPUTS = ("vision_config", "audio_config", "image_config", "vq_config")


def load_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a causal language model in a folder; no remote code.

    Raises CheckpointError, in one sentence with the cure, if it is missing or broken, or if this service cannot compute
    such a model: an unknown architecture, an encoder, an encoder-decoder, quantised weights.
    """
    check_files(folder)
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder} has no usable config.json: copy it from the checkpoint that the weights are of"
        )
    raw = read_json(folder / CONFIG)
    _check_known(folder, raw)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except INVALID as error:
        raise CheckpointError(
            f"{folder} has no usable config.json ({first_line(error)}): copy it again from the checkpoint"
        ) from error
    _check_computable(folder, config)
    _check_named_class(folder, raw)
    return config


def first_line(error: Exception) -> str:
    """The first line of an error's message, with the next if it ends with a colon; the type if it has none."""
    first, _, rest = str(error).strip().partition("\n")
    if first.endswith(":"):
        first += f" {rest.strip().partition(chr(10))[0]}"
    return first.strip() or type(error).__name__


def _check_known(folder: Path, raw: dict[str, object]) -> None:
    kind = raw.get("model_type")
    if not isinstance(kind, str):
        raise CheckpointError(
            f"{folder / CONFIG} has no model_type, so its architecture is unknown: copy config.json again from the "
            "checkpoint"
        )
    if kind in CONFIG_MAPPING:
        return
    if "auto_map" in raw:
        raise CheckpointError(
            f"{folder}: its architecture {kind!r} is code in the checkpoint, which is never run: use a checkpoint in "
            "the format of transformers' own classes"
        )
    raise CheckpointError(
        f"{folder}: transformers {transformers.__version__} does not support its architecture {kind!r}: correct "
        "model_type in config.json, or install a newer transformers"
    )


def _check_named_class(folder: Path, raw: dict[str, object]) -> None:
    """Raises CheckpointError if `architectures` names the class of another model than `model_type`.

    Many models have weights of the same names and shapes, as Llama and Gemma, and compute other log-probs from them.
    """
    kind, named = str(raw["model_type"]), raw.get("architectures")
    for name in named if isinstance(named, list) else []:
        kinds = [each for each, class_name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if class_name == name]
        if kinds and kind.removesuffix("_text") not in {each.removesuffix("_text") for each in kinds}:
            raise CheckpointError(
                f"{folder / CONFIG} contradicts itself: model_type is {kind!r}, but architectures names {name} (of "
                f"{', '.join(kinds)}), which computes other log-probs from the same weights: correct the wrong one"
            )


def _check_sizes(folder: Path, config: PreTrainedConfig) -> None:
    text = config.get_text_config()
    if not isinstance(text, PreTrainedConfig):
        raise CheckpointError(
            f"{folder / CONFIG} has a text_config of another model: copy it again from the checkpoint"
        )
    for name, largest in LARGEST_SIZES.items():
        size = getattr(text, name, None)
        if isinstance(size, int) and not 0 < size <= largest:
            raise CheckpointError(f"{folder / CONFIG} states {name} {size}, which no model has: copy it again")


def _check_computable(folder: Path, config: PreTrainedConfig) -> None:
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(
            f"{folder} is an encoder-decoder model ({kind}): only decoders that continue their prompt are served and "
            "trained, so use a causal language model"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        other = [name for name in OTHER_INPUTS if hasattr(config, name)]
        what = "a multimodal model without a text path" if other else "not a causal language model"
        raise CheckpointError(
            f"{folder} is {what} ({kind}): transformers has no causal language model for it, so use a checkpoint of "
            "the language model alone"
        )
    if getattr(config, "is_decoder", True) is False and kind not in CAUSAL_WITHOUT_SAYING:
        raise CheckpointError(
            f"{folder} is an encoder ({kind} with is_decoder false), whose tokens attend to later ones: use a causal "
            "language model, or set is_decoder true in config.json if it was trained as a decoder"
        )
    _check_sizes(folder, config)
    _check_quantisation(folder, config)


def quantisation(config: PreTrainedConfig) -> str | None:
    """The quantisation that a configuration names; None if the weights are floats."""
    found = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    return str((found if isinstance(found, dict) else found.to_dict()).get("quant_method")) if found else None


def _check_quantisation(folder: Path, config: PreTrainedConfig) -> None:
    method = quantisation(config)
    if method is None:
        return
    if method not in COMPUTED_AS_FLOATS:
        raise CheckpointError(
            f"{folder} is quantised ({method}): log-probs are computed and verified with float weights only, so use "
            "the unquantised checkpoint, or dequantise it and remove quantization_config from config.json (vLLM can "
            "quantise it again: docs/engines.md)"
        )
