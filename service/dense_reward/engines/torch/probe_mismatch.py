"""Finds why a served model does not reproduce its stored probe: rounding, other files, or a wrong computation."""

import numpy as np
import torch

from dense_reward.engines.proof import PROBE_TOLERANCE_NATS, Checkpoint, rms, stored_logprobs
from dense_reward.engines.torch.model import TorchModel, load_model
from dense_reward.records import FloatArray


def mismatch_cure(served: TorchModel, checkpoint: Checkpoint) -> str:
    """The cause and the cure, found by computing the probe in float32 on the CPU, one sequence at a time.

    Loads the checkpoint once more if it is served in another dtype than float32.
    """
    tolerance = PROBE_TOLERANCE_NATS["float32"]
    plain = served if _is_plain_float32(served) else _loaded_in_float32(checkpoint)
    difference = rms(_logprobs(plain, checkpoint) - stored_logprobs(checkpoint.manifest))
    if not difference <= tolerance:
        return (
            f"in float32 it differs too ({difference:.2g} nats), so this is not rounding: the probe was measured on "
            "other files. Correct the path, or adopt the checkpoint again"
        )
    rounded = rms(_logprobs(served, checkpoint) - stored_logprobs(checkpoint.manifest))
    if checkpoint.dtype in {"float16", "bfloat16"} and not rounded <= checkpoint.tolerance / 2:
        return (
            f"computed in float32 it matches ({difference:.2g} nats), so this is rounding of {checkpoint.dtype}: serve "
            "it with --dtype float32"
        )
    return (
        f"computed one sequence at a time in float32 it matches ({difference:.2g} nats), so neither the files nor "
        "rounding are the cause, but how this service computes a batch: report it with the model's config.json, and "
        "use --engine vllm until it is fixed"
    )


def _is_plain_float32(model: TorchModel) -> bool:
    return model.dtype is torch.float32 and model.device.type == "cpu"


def _loaded_in_float32(checkpoint: Checkpoint) -> TorchModel:
    return load_model(checkpoint.folder, checkpoint.manifest, dtype="float32", device="cpu")


def _logprobs(model: TorchModel, checkpoint: Checkpoint) -> FloatArray:
    """The probe's log-probs by the plainest path, [S] nats."""
    found = [
        model.logprobs(sequence.prompt_ids, response.ids)
        for sequence in checkpoint.manifest.probe
        for response in sequence.responses
    ]
    return np.concatenate([np.array(logprobs, dtype=np.float32) for logprobs in found])
