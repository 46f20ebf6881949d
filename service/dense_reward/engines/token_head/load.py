"""A token head on disk -> a verified HeadEngine, which reproduces the values that its manifest stores."""

from pathlib import Path

import numpy as np

from dense_reward.engines.proof import (
    HEAD,
    Checkpoint,
    encoder_of,
    probe_trunks,
    report_template,
    revision_of,
    verify_probe,
)
from dense_reward.engines.token_head.engine import HeadEngine, HeadModel, load_head
from dense_reward.engines.torch.load import LoadContext, ServingOptions, served_dtype, verified
from dense_reward.engines.torch.model import DTYPES
from dense_reward.errors import CheckpointError
from dense_reward.hashed_files import refuse_changed
from dense_reward.manifest import load_manifest
from dense_reward.records import EngineInfo, Report, Wants
from dense_reward.text.encode import Encoder


def load_token_head(folder: Path, serving: ServingOptions, context: LoadContext) -> tuple[HeadEngine, Encoder, str]:
    """Engine, encoder and tokenizer hash of a token head.

    Raises CheckpointError, with the cure, for anything that would make a value wrong.
    """
    report = context.report
    manifest = load_manifest(folder)
    if manifest.role != HEAD:
        raise CheckpointError(
            f"{folder} is a checkpoint of role {manifest.role}, not a token head: serve it with --sft and --reference, "
            "or adopt it with --role token_head if it is a reward model"
        )
    before = verified([folder], [manifest], serving, report)
    dtype = served_dtype(manifest, serving, report)
    checkpoint = Checkpoint(HEAD, folder, manifest, dtype)
    tokenizer = context.models.tokenizer(folder, manifest)
    model = _loaded(checkpoint, serving, context)
    refuse_changed(before)
    info = EngineInfo(
        sft=None,
        reference=None,
        token_head=str(folder),
        revision=revision_of([checkpoint], [HEAD, serving.norm_dtype, serving.deterministic]),
        dtype=dtype,
        device=serving.device,
        vocab_size=min(model.vocab_size, tokenizer.vocab_size),
        max_length_tokens=min(model.max_length_tokens, serving.max_batch_tokens),
        quantities=frozenset(),
        related=True,
    )
    engine = HeadEngine(model, info, max_batch_tokens=serving.max_batch_tokens, alone=serving.deterministic)
    context.on_device(lambda: _verify_probe(engine, checkpoint, report))
    encoder = encoder_of(tokenizer, manifest, folder)
    report_template(encoder, tokenizer, manifest, report)
    return engine, encoder, manifest.tokenizer_sha256


def _loaded(checkpoint: Checkpoint, serving: ServingOptions, context: LoadContext) -> HeadModel:
    context.report(f"loading {HEAD} in {checkpoint.dtype} on {serving.device}; its last layer in float32")
    served_as = {"dtype": checkpoint.dtype, "device": serving.device}
    model = load_head(checkpoint.folder, checkpoint.manifest, **served_as, make_room=context.make_room)
    if serving.norm_dtype is not None:
        model.use_norms(DTYPES[serving.norm_dtype])
    context.report(f"path: padded; memory: weights {model.weights_bytes / 1e6:,.0f} MB")
    return model


def _verify_probe(engine: HeadEngine, checkpoint: Checkpoint, report: Report) -> None:
    """Compare the engine's values with the stored probe. Raises CheckpointError if they disagree."""
    found = engine.score(probe_trunks(checkpoint.manifest), Wants())
    values = [scores.value_S for branches in found for scores in branches if scores.value_S is not None]
    short = checkpoint.dtype in {"float16", "bfloat16"}
    cure = (
        "serve it with --dtype float32; if it is refused then too, the probe was measured on other files"
        if short
        else "the probe was measured on other files: correct the path, or adopt the checkpoint again"
    )
    verify_probe(HEAD, np.concatenate(values), checkpoint, cure=lambda: cure, report=report)
