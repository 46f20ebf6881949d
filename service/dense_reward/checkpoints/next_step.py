"""The command that a user needs after an adoption: adopt the other checkpoint of the pair, or serve both."""

import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from dense_reward.errors import CheckpointError
from dense_reward.hashed_files import MANIFEST_NAME
from dense_reward.manifest import Manifest, check_pair, load_manifest
from dense_reward.text.undecided import choice_argument

OTHER = {"sft": "reference", "reference": "sft"}


def next_step(folder: Path, manifest: Manifest, *, end_of_turn: str | None) -> str:
    """One line. `end_of_turn`: the token, if it had to be named."""
    if manifest.role == "token_head":
        return f"dense-reward serve --token-head {shlex.quote(str(folder))}"
    if manifest.role not in OTHER:
        policies = shlex.quote(f"policies={{sft: SFT_CHECKPOINT, policy: {folder}}}")
        return f"dense-reward-train evaluate evaluate_full {policies} held_out=HELD_OUT_FILE"
    other = _other_of_pair(folder, manifest)
    if other is not None:
        sft, reference = (folder, other) if manifest.role == "sft" else (other, folder)
        return f"dense-reward serve --sft {shlex.quote(str(sft))} --reference {shlex.quote(str(reference))}"
    what = "EARLIER_CHECKPOINT" if manifest.role == "sft" else "FINISHED_CHECKPOINT"
    choices = "".join(f" {choice}" for choice in _choices(manifest, end_of_turn))
    return f"dense-reward adopt {what} --role {OTHER[manifest.role]} --run-id {shlex.quote(manifest.run_id)}{choices}"


def _choices(manifest: Manifest, end_of_turn: str | None) -> Iterator[str]:
    """What both checkpoints of a pair must have alike."""
    if manifest.renderer != "chat":
        yield choice_argument("renderer", manifest.renderer, "flags")
    if end_of_turn is not None:
        yield choice_argument("end_of_turn", end_of_turn, "flags")
    if manifest.template_kwargs:
        yield choice_argument("template_kwargs", manifest.template_kwargs, "flags")
    for name, value in (("response_prefix", manifest.response_prefix), ("template_date", manifest.template_date)):
        if value is not None:
            yield choice_argument(name, value, "flags")


def _other_of_pair(folder: Path, manifest: Manifest) -> Path | None:
    """A checkpoint next to this one with which it is a pair; the one adopted last if there are several."""
    found: list[tuple[str, Path]] = []
    for path in sorted(folder.absolute().parent.glob(f"*/{MANIFEST_NAME}")):
        with suppress(CheckpointError):
            other = load_manifest(path.parent)
            if other.role == OTHER[manifest.role]:
                sft, reference = (manifest, other) if manifest.role == "sft" else (other, manifest)
                check_pair(sft, reference, allow_unrelated=False)
                found.append((other.created_at, folder.parent / path.parent.name))
    return max(found)[1] if found else None
