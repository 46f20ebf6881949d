"""What was measured of each policy, in files that are written whole: a stopped job continues. Must not know jobs.

`measured/NAME.json` has the figures and a hash of everything that they depend on, `samples-NAME.jsonl` the responses.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from dense_reward.checkpoints.atomic_file import write_whole
from dense_reward.manifest import Manifest
from dense_reward.records import Report
from pydantic import BaseModel, ConfigDict, ValidationError

from dense_reward_trainer.configs.evaluate import PolicyOptions
from dense_reward_trainer.rl.held_out_metrics import HeldOutResult, SampledResponse


class KeptPolicy(BaseModel):
    """The figures of one policy. `inputs`: what they depend on, in words -> its value or hash.

    `pairs`: name of each pair at the service that scored the policy -> its revision.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    figures: HeldOutResult
    pairs: dict[str, str]
    inputs: dict[str, str]
    samples_sha256: str


def inputs_of(
    options: PolicyOptions, manifests: Mapping[str, Manifest], pairs: Mapping[str, str], group_size: int
) -> dict[str, str]:
    """What the figures of a policy depend on, beside the configuration of the job and the prompts."""
    inputs = {"its options": options.model_dump_json(), "the number of samples drawn together": str(group_size)}
    inputs |= {f"the checkpoint {folder}": manifest.content_sha256 for folder, manifest in manifests.items()}
    return inputs | {f"the pair {name} of the service": revision for name, revision in pairs.items()}


def keep(folder: Path, name: str, figures: HeldOutResult, samples: Sequence[SampledResponse], *,
         pairs: Mapping[str, str], inputs: Mapping[str, str]) -> KeptPolicy:  # fmt: skip
    """Writes the responses, and after them the figures, which make the policy count as measured."""
    content = "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples).encode()
    write_whole(_samples(folder, name), content)
    kept = KeptPolicy(
        figures=figures,
        pairs=dict(pairs),
        inputs=dict(inputs),
        samples_sha256=hashlib.sha256(content).hexdigest(),
    )
    _figures(folder, name).parent.mkdir(exist_ok=True)
    write_whole(_figures(folder, name), kept.model_dump_json(indent=2).encode() + b"\n")
    return kept


def kept_policy(folder: Path, name: str, inputs: Mapping[str, str], report: Report) -> KeptPolicy | None:
    """What an earlier start measured; None if it did not, or of other inputs, which is reported with the reason."""
    if not _figures(folder, name).is_file():
        return None
    reason = ""
    try:
        kept = KeptPolicy.model_validate_json(_figures(folder, name).read_bytes())
    except ValidationError:
        kept, reason = None, f"{_figures(folder, name)} cannot be read"
    if kept is not None:
        changed = [what for what in {**kept.inputs, **inputs} if kept.inputs.get(what) != inputs.get(what)]
        if changed:
            reason = f"{' and '.join(changed)} changed"
        elif not _samples_are_those_of(folder, name, kept):
            reason = f"{_samples(folder, name)} is missing, or was changed"
    if reason:
        report(f"{name} is measured again: {reason}")
        return None
    return kept


def _samples_are_those_of(folder: Path, name: str, kept: KeptPolicy) -> bool:
    path = _samples(folder, name)
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == kept.samples_sha256


def _figures(folder: Path, name: str) -> Path:
    return folder / "measured" / f"{name}.json"


def kept_samples(folder: Path, name: str) -> list[SampledResponse]:
    """The responses that `keep` has written."""
    lines = _samples(folder, name).read_text("utf-8").split("\n")
    return [SampledResponse(**json.loads(line)) for line in lines if line]


def _samples(folder: Path, name: str) -> Path:
    return folder / f"samples-{name}.jsonl"
