"""A checkpoint's files -> a transformers model. Service and trainer load weights only here."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from dense_reward.errors import CheckpointError
from dense_reward.manifest import Manifest, files_folder


def weight_folders(folder: Path, manifest: Manifest) -> tuple[Path, Path]:
    """The folders of a checkpoint's own files and of its weights: an adapter's base model, or the same folder."""
    files = files_folder(folder, manifest)
    return files, files if manifest.adapter_base is None else Path(manifest.adapter_base)


def load_weights(files: Path, base: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A causal language model from local safetensors. If `base` is another folder, `files` is an adapter to it.

    No remote code. Raises CheckpointError if a package is missing or transformers cannot load the files.
    """
    try:
        config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=plain_attention(config),
            experts_implementation="eager" if dtype is torch.float64 else None,  # grouped matmuls lack float64
        )
        if base != files:
            from peft import PeftModel  # noqa: PLC0415 - only adapters need peft

            model = PeftModel.from_pretrained(model, files).merge_and_unload()
    except ModuleNotFoundError as error:
        raise CheckpointError(f"{files}: loading it needs {error.name}: pip install {error.name}") from error
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{files}: transformers cannot load it: {error}") from error
    return model


def plain_attention(config: PreTrainedConfig) -> str | None:
    """eager if attention scores are soft-capped: sdpa has no caps, and some versions drop them silently."""
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None else None


def stored_dtype(folder: Path) -> str:
    """The dtype in a checkpoint's configuration; float32 if it has none."""
    dtype = getattr(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False), "dtype", None)
    return str(dtype or torch.float32).removeprefix("torch.")
