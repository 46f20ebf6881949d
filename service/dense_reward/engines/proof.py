"""Start-up verification, the same for every engine: log-probs against the checkpoint's stored probe, and identity.

Each engine computes the probe's sequences in its own way. This module compares them with the stored log-probs at a
tolerance, and computes the revision of a pair. Must not import an engine.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dense_reward.engines.tokenizer import TransformersTokenizer, load_tokenizer
from dense_reward.errors import CheckpointError, RequestError
from dense_reward.manifest import Manifest, files_folder, sha256_of_text
from dense_reward.records import Branch, EngineInfo, FloatArray, Report, Trunk
from dense_reward.text.encode import Encoder

ROLES = ("sft", "reference")
HEAD = "token_head"
# Root mean square of (served - stored) log-probs over the probe, in nats, above which a service does not start. Wrong
# attention or positions differ by more than 0.5 nats. Rounding was a tenth of each bound on the tested models.
PROBE_TOLERANCE_NATS = {"float64": 1e-3, "float32": 1e-3, "float16": 0.1, "bfloat16": 0.3}


HEAD_TOLERANCE = {"float64": 1e-3, "float32": 1e-3, "float16": 0.1, "bfloat16": 0.3}
"""The same for a token head, as a share of the standard deviation of its stored values, whose scale is arbitrary."""
EPSILON = {"float64": 1.2e-7, "float32": 1.2e-7, "float16": 9.8e-4, "bfloat16": 7.8e-3}
"""Rounding of one number in a dtype; the stored values themselves are float32."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One served checkpoint: its role (sft | reference | token_head), folder, manifest, and dtype as served."""

    role: str
    folder: Path
    manifest: Manifest
    dtype: str

    @property
    def numbers(self) -> str:
        """What its probe stores, in words."""
        return "values" if self.role == HEAD else "log-probs"

    @property
    def unit(self) -> str:
        """The unit of these numbers, after a space; the scale of a head's values is arbitrary."""
        return "" if self.role == HEAD else " nats"

    @property
    def tolerance(self) -> float:
        """The largest rms difference from the stored probe that rounding in its dtype explains."""
        if self.role != HEAD:
            return PROBE_TOLERANCE_NATS[self.dtype]
        stored_S = stored_logprobs(self.manifest)
        return HEAD_TOLERANCE[self.dtype] * float(stored_S.std()) + 4 * EPSILON[self.dtype] * rms(stored_S)


def probe_trunks(manifest: Manifest) -> list[Trunk]:
    """The probe's prompts, each with its responses, all tokens scored. Raises CheckpointError if it is empty."""
    stored_logprobs(manifest)
    return [_trunk(sequence.prompt_ids, [r.ids for r in sequence.responses]) for sequence in manifest.probe]


def check_probe(checkpoint_folder: Path, manifest: Manifest, *, vocabulary: int, longest: int) -> None:
    """Raises CheckpointError if the probe cannot be computed: a GPU is lost to ids that its model does not have.

    `longest`: the longest sequence that the model and a batch can hold, in tokens.
    """
    if manifest.vocabulary > vocabulary:
        raise CheckpointError(
            f"{checkpoint_folder}: the model has {vocabulary} output rows, but its manifest states "
            f"{manifest.vocabulary}: adopt the checkpoint again"
        )
    if manifest.longest_probe_tokens > longest:
        raise CheckpointError(
            f"{checkpoint_folder}: its probe has a sequence of {manifest.longest_probe_tokens} tokens, but the model "
            f"and a batch hold {longest} (--max-batch-tokens): raise it, or adopt the checkpoint again"
        )
    stored_logprobs(manifest)


def stored_logprobs(manifest: Manifest) -> FloatArray:
    """The probe's stored log-probs, one response after another, [S] nats; of a token head, its values.

    Raises CheckpointError if there are none.
    """
    stored = [response.logprobs for sequence in manifest.probe for response in sequence.responses]
    if not any(stored):
        raise CheckpointError(f"the manifest of {manifest.role} has an empty probe: adopt the checkpoint again")
    return np.concatenate([np.array(logprobs, dtype=np.float32) for logprobs in stored])


def rms(difference_S: FloatArray) -> float:
    """Root mean square, accumulated in float64; NaN if any element is."""
    return float(np.sqrt(np.mean(np.square(difference_S, dtype=np.float64))))


def verify_probe(
    name: str, served_S: FloatArray, checkpoint: Checkpoint, *, cure: Callable[[], str], report: Report
) -> None:
    """Compare served with stored numbers of the probe, and report the difference. `name`: the model that served them.

    Raises CheckpointError, ending with `cure()`, if they differ by more than the checkpoint's dtype explains.
    """
    stored_S = stored_logprobs(checkpoint.manifest)
    difference, tolerance = rms(served_S - stored_S), checkpoint.tolerance
    unit, most = checkpoint.unit, f"{tolerance:.3g}"
    report(f"probe of {name}: rms difference {difference:.2g}{unit} over {len(stored_S)} tokens (at most {most})")
    if not difference <= tolerance:  # also if it is NaN
        raise CheckpointError(
            f"{name} is computed wrong: its {checkpoint.numbers} differ from the stored probe of {checkpoint.role} by "
            f"{difference:.3g}{unit} (rms, at most {most} in {checkpoint.dtype}): {cure()}"
        )


def tokenizer_of(folder: Path, manifest: Manifest) -> TransformersTokenizer:
    """A checkpoint's tokenizer. Raises CheckpointError if it or its template is not that of the manifest."""
    tokenizer = load_tokenizer(files_folder(folder, manifest))
    if tokenizer.sha256() != manifest.tokenizer_sha256:
        raise CheckpointError(f"{folder}: its tokenizer is not the one of its manifest: adopt the checkpoint again")
    if tokenizer.template_sha256(manifest.renderer) != manifest.template_sha256:
        raise CheckpointError(f"{folder}: its chat template is not the one of its manifest: adopt the checkpoint again")
    encoder_of(tokenizer, manifest, folder)
    return tokenizer


def encoder_of(tokenizer: TransformersTokenizer, manifest: Manifest, folder: Path) -> Encoder:
    """The encoder that a manifest describes. Raises CheckpointError if the template drops a message's words."""
    encoder = Encoder(tokenizer, manifest.renderer, manifest.end_of_turn_id, choices=manifest.choices)
    try:
        encoder.undecided("flags")
    except RequestError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    return encoder


def report_template(encoder: Encoder, tokenizer: TransformersTokenizer, manifest: Manifest, report: Report) -> None:
    """Report what a user must know of the chat template before texts are scored."""
    if _was_trained_with_dummy_prefix(encoder, manifest):
        report(
            "an earlier version trained these checkpoints with a space before each response (the tokenizer's dummy "
            "prefix), but texts are scored without it now: train the pair again, or send ids"
        )
    undecided = encoder.undecided("flags")
    if undecided is not None:
        report(f"texts and chats are refused (undecided_template): {undecided}")
    if encoder.renderer == "chat" and tokenizer.asks_for_the_date and encoder.choices.template_date is None:
        report(
            "the chat template writes today's date, so the same text will get different rewards tomorrow: adopt both "
            "checkpoints again, which stores a date in their manifests (--template-date YYYY-MM-DD sets it)"
        )


def _was_trained_with_dummy_prefix(encoder: Encoder, manifest: Manifest) -> bool:
    """Whether responses had it in training here (data_sha256), when manifests had no response_prefix, but not now."""
    if not encoder.tokenizer.has_dummy_prefix or manifest.data_sha256 is None:
        return False
    is_old = "response_prefix" not in manifest.model_fields_set
    return is_old and (encoder.renderer != "chat" or encoder.chat.place().continues)


def pair_info(
    checkpoints: Sequence[Checkpoint],
    *,
    options: Sequence[object],
    device: str,
    vocab_size: int,
    max_length_tokens: int,
    quantities: frozenset[str],
    related: bool,
) -> EngineInfo:
    """The EngineInfo of a pair. `options`: what scores depend on in addition to the checkpoints (JSON values)."""
    sft, reference = checkpoints
    return EngineInfo(
        sft=str(sft.folder),
        reference=str(reference.folder),
        revision=revision_of(checkpoints, options),
        dtype=sft.dtype,
        device=device,
        vocab_size=vocab_size,
        max_length_tokens=max_length_tokens,
        quantities=quantities,
        related=related,
    )


def revision_of(checkpoints: Sequence[Checkpoint], options: Sequence[object]) -> str:
    """Hash of everything that a score depends on: all files, the dtypes, the options, and how text becomes ids."""
    facts: list[object] = [
        [each.manifest.content_sha256, each.dtype, each.manifest.renderer, each.manifest.end_of_turn_id]
        for each in checkpoints
    ]
    choices = [dataclasses.asdict(each.manifest.choices) for each in checkpoints]
    if any(value not in (None, {}) for chosen in choices for value in chosen.values()):
        facts.append(choices)  # not if there are none: pairs keep their revision
    return sha256_of_text(json.dumps([*facts, [*options]]))[:16]


def _trunk(prompt_ids: Sequence[int], responses: Sequence[Sequence[int]]) -> Trunk:
    branches = tuple(Branch(np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=bool)) for ids in responses)
    return Trunk(np.array(prompt_ids, dtype=np.int32), branches)
