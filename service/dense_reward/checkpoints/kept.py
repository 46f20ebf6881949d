"""What a new adoption keeps of the manifest that a checkpoint already has, so that a user repeats nothing."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from dense_reward.checkpoints.findings import Checked
from dense_reward.checkpoints.probe import probe_numbers
from dense_reward.engines.proof import Checkpoint, rms, stored_logprobs, tokenizer_of
from dense_reward.engines.tokenizer import TransformersTokenizer
from dense_reward.errors import CheckpointError
from dense_reward.hashed_files import MANIFEST_NAME, verify_hashes
from dense_reward.manifest import Manifest, Role, load_manifest
from dense_reward.records import Report
from dense_reward.text.tokenizer import RendererName

_RECORD = (
    *("optimiser_step", "samples_processed", "samples_total", "unique_samples", "learning_rate", "base_model"),
    *("data_sha256", "seed"),
)
"""What a manifest records of the training that made its weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a user decides about a checkpoint; None: not given. `end_of_turn`: a token, or its id."""

    role: Role | None = None
    run_id: str | None = None
    renderer: RendererName | None = None
    end_of_turn: str | int | None = None
    dtype: str | None = None
    template_kwargs: Mapping[str, JsonValue] | None = None
    response_prefix: str | None = None
    template_date: str | None = None


@dataclass(frozen=True, slots=True)
class Earlier:
    """A manifest that an earlier adoption or training has written, and its folder."""

    folder: Path
    manifest: Manifest


def earlier_manifest(folders: Sequence[Path], wanted: Wanted, report: Report) -> Earlier | None:
    """The manifest of the first folder that has one.

    Raises CheckpointError if role or run id are not given, and manifests of two folders differ in them or one is
    broken.
    """
    named = wanted.role is not None and wanted.run_id is not None
    found: list[Earlier] = []
    for folder in dict.fromkeys(folder.resolve() for folder in folders):
        if not (folder / MANIFEST_NAME).is_file():
            continue
        try:
            found.append(Earlier(folder, load_manifest(folder)))
        except CheckpointError as error:
            if not named:
                raise CheckpointError(f"{error}: name --role and --run-id; nothing is kept of it") from None
            report(f"nothing is kept of {folder / MANIFEST_NAME}, because it is broken")
    identities = {(each.manifest.role, each.manifest.run_id) for each in found}
    if len(identities) > 1 and not named:
        both = " and ".join(f"{each.folder} ({_identity(each.manifest)})" for each in found)
        raise CheckpointError(f"{both} have different manifests: name --role and --run-id")
    return found[0] if found else None


def with_kept(wanted: Wanted, earlier: Earlier, tokenizer: TransformersTokenizer, report: Report) -> Wanted:
    """`wanted` with what the earlier manifest decides and the user does not; reports what that is.

    Choices about the chat template are kept only if the template is still the same. Variables and response prefix are
    one decision: either of them replaces both.
    """
    manifest = earlier.manifest
    usable = manifest.renderer != "chat" or tokenizer.has_chat_template
    renderer = wanted.renderer or (manifest.renderer if usable else None)
    merged = replace(
        wanted, role=wanted.role or manifest.role, run_id=wanted.run_id or manifest.run_id, renderer=renderer
    )
    if is_of(manifest, tokenizer, renderer):
        if wanted.template_kwargs is None and wanted.response_prefix is None:
            prefix = manifest.response_prefix
            merged = replace(merged, template_kwargs=manifest.template_kwargs or None, response_prefix=prefix)
        date, end = wanted.template_date or manifest.template_date, wanted.end_of_turn
        merged = replace(merged, template_date=date, end_of_turn=manifest.end_of_turn_id if end is None else end)
    elif renderer == manifest.renderer:
        report("tokenizer or chat template changed since the earlier adoption, so its choices about them are not kept")
    kept = ", ".join(differences_in_words(wanted, merged, tokenizer))
    if kept:
        report(f"kept from {earlier.folder / MANIFEST_NAME}: {kept} (--ignore-manifest keeps nothing)")
    return merged


def is_of(manifest: Manifest, tokenizer: TransformersTokenizer, renderer: RendererName | None) -> bool:
    """Whether a manifest's choices are about this tokenizer, with its chat template, and this renderer."""
    if renderer != manifest.renderer or tokenizer.sha256() != manifest.tokenizer_sha256:
        return False
    return tokenizer.template_sha256(manifest.renderer) == manifest.template_sha256


def with_record(manifest: Manifest, earlier: Earlier, wanted: Wanted, *, check: bool) -> Manifest:
    """A new manifest with the record of the training, if its weights are those of the earlier one.

    Raises CheckpointError, unless `check`, if the weights changed and `wanted`, what the user gave, lacks role or run
    id: those of the earlier manifest may not be true of the new weights.
    """
    before = earlier.manifest
    if manifest.weights_sha256 != before.weights_sha256:
        if not check and (wanted.role is None or wanted.run_id is None):
            raise CheckpointError(
                f"the weights are not those of {earlier.folder / MANIFEST_NAME} ({_identity(before)}): name --role and "
                "--run-id of these"
            )
        return manifest
    record = {name: value for name in _RECORD if (value := getattr(before, name)) is not None}
    return manifest.model_copy(update=record | ({} if wanted.dtype else {"dtype": before.dtype}))


def verify_manifest(found: Checked, earlier: Earlier) -> None:
    """Raises CheckpointError, which says what changed, if a manifest does not describe its checkpoint any more."""
    manifest, folder = earlier.manifest, earlier.folder
    try:
        verify_hashes(folder, manifest.files, found.manifest.files)
        verify_hashes(folder, manifest.adapter_base_files, found.manifest.adapter_base_files)
        checkpoint = Checkpoint(manifest.role, folder, manifest, "float32")
        tokenizer_of(folder, manifest)
        served_S = [
            logprob
            for sequence in manifest.probe
            for response in sequence.responses
            for logprob in probe_numbers(found.model, sequence.prompt_ids, response.ids)
        ]
        difference = rms(np.array(served_S, dtype=np.float32) - stored_logprobs(manifest))
    except CheckpointError as error:
        raise CheckpointError(f"{folder / MANIFEST_NAME} does not match any more: {error}") from None
    if not difference <= checkpoint.tolerance:
        raise CheckpointError(
            f"{folder / MANIFEST_NAME} does not match any more: the weights are the same, but their "
            f"{checkpoint.numbers} differ from its probe by {difference:.3g}{checkpoint.unit} (rms): adopt the "
            "checkpoint again"
        )


def _identity(manifest: Manifest) -> str:
    return f"role {manifest.role}, run id {manifest.run_id}"


def differences_in_words(given: Wanted, merged: Wanted, tokenizer: TransformersTokenizer) -> Iterator[str]:
    """What `merged` decides in addition to what the user has given, each as name and value."""
    for field in fields(Wanted):
        value = getattr(merged, field.name)
        if getattr(given, field.name) is None and value not in (None, {}):
            is_id = field.name == "end_of_turn" and isinstance(value, int)
            yield f"{field.name} {_shown(tokenizer.pieces([value])[0] if is_id else value)}"


def _shown(value: JsonValue | Mapping[str, JsonValue]) -> str:
    return json.dumps(value, ensure_ascii=False) if not isinstance(value, str) or not value.isalnum() else value
