"""A base model whose frozen weights are held in 4 bits on the GPU, for QLoRA (arXiv 2305.14314).

Not run: needs a GPU. Tests cover its configuration and what is refused.
"""

import os
from pathlib import Path

import torch
from dense_reward.engines.weight_keys import Keys, refuse_wrong_keys
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

QUANTISED = (
    "lora.quantise: training adds the adapter to a base in 4 bits; checkpoints and the service add it to the base as "
    "it is on disk, whose log-probs differ a little. Their probes are measured with the latter"
)


def quantised_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder on this process's GPU: weights in NF4, doubly quantised; it computes in `dtype`.

    Raises CheckpointError if a weight is missing, unexpected or of another shape.
    """
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        quantization_config=four_bits(dtype),
        device_map={"": int(os.environ.get("LOCAL_RANK", "0"))},
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused below, by name
    )
    keys = Keys(info["missing_keys"], info["unexpected_keys"], [*info["mismatched_keys"]])
    refuse_wrong_keys(folder, keys, model.config, text_of_multimodal=False)
    return model


def four_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
