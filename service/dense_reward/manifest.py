"""The manifest of a checkpoint: what it is, hashes of its files, and a probe that verifies how an engine computes it.

The manifest is written last, so a folder that has one is complete. The hashes detect changed files, but not an
attacker: one who can change the files can change the manifest. Imports no torch.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, ValidationError, model_validator

from dense_reward.errors import CheckpointError
from dense_reward.folders import is_folder, named_folders
from dense_reward.hashed_files import MANIFEST_NAME, hash_files, refuse_run_folder, verify_hashes, why_no_folder
from dense_reward.text.template import TemplateChoices
from dense_reward.text.tokenizer import RendererName

MAX_MANIFEST_BYTES = 8_000_000
"""Far above any: it is parsed while other threads wait."""
MAX_PROBE_SEQUENCES, MAX_PROBE_TOKENS = 256, 32_768
"""Limits on a probe: it is computed while requests of other pairs wait."""
CONFIGURATIONS = ("config.json", "adapter_config.json")
EQUAL_MODELS = (
    "sft and reference are the same model, so every reward would be 0: name an earlier checkpoint of the run as the "
    "reference"
)
Role = Literal["sft", "reference", "policy", "token_head"]

# Never change this text: clients hash it with their own tokenizers, and the hashes must agree.
TOKENIZER_PROBE_TEXT = (
    "Hello world! It's 12,345.67 + 8 = ?\n\n\tdef f(x): return x**2  # naive café\n"
    "数学の問題を解く。 Привет, мир! مرحبا 안녕하세요 👩‍🔬🚀 e\u0301"
)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ProbeResponse(_Strict):
    ids: tuple[int, ...]
    logprobs: tuple[FiniteFloat, ...] = Field(
        description="float32 log-prob of each id, in nats; of a token_head, its value after each id"
    )

    @model_validator(mode="after")
    def _one_each(self) -> "ProbeResponse":
        if len(self.ids) != len(self.logprobs):
            raise ValueError(f"{len(self.ids)} ids, but {len(self.logprobs)} log-probs")
        return self


class ProbeSequence(_Strict):
    prompt_ids: tuple[int, ...] = Field(min_length=1)
    responses: tuple[ProbeResponse, ...]


class Manifest(_Strict):
    """What a service checks before it serves a checkpoint. A field is null if its value is unknown."""

    manifest_version: Literal[1] = 1
    role: Role
    run_id: str = Field(description="equal for all checkpoints of one run")
    optimiser_step: int | None = None
    samples_processed: int | None = Field(None, description="demonstrations seen so far, repeats counted")
    samples_total: int | None = Field(None, description="demonstrations that the whole run processes, repeats counted")
    unique_samples: int | None = None
    learning_rate: float | None = Field(None, description="when the checkpoint was saved")
    base_model: str | None = Field(None, description="what training started from")
    renderer: RendererName
    end_of_turn_id: int | None
    template_kwargs: dict[str, JsonValue] = Field(
        default_factory=dict, description="variables that the chat template gets whenever it renders"
    )
    response_prefix: str | None = Field(
        None,
        description="text between the generation prompt and a response: context, not scored. Empty: the response "
        "follows the generation prompt directly. null: not decided",
    )
    template_date: str | None = Field(None, description="YYYY-MM-DD, for a chat template that writes the date")
    vocabulary: int = Field(description="rows of the model's output layer; ids are in [0, vocabulary)")
    tokenizer_sha256: str
    template_sha256: str
    data_sha256: str | None = None
    seed: int | None = None
    dtype: str = Field(description="dtype of the weights on disk")
    source: str | None = Field(
        None, description="folder of the files, if it is not the manifest's folder; named like adapter_base"
    )
    adapter_base: str | None = Field(
        None,
        description="base model of a LoRA adapter: a folder, relative to the manifest's (./ or ../) or absolute, or a "
        "hub id@revision",
    )
    files: dict[str, str] = Field(description="file name -> sha256")
    adapter_base_files: dict[str, str] = Field(default_factory=dict)
    probe: tuple[ProbeSequence, ...]
    created_at: str
    versions: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _date_is_one(self) -> "Manifest":
        if self.template_date is not None:
            date.fromisoformat(self.template_date)
        return self

    @model_validator(mode="after")
    def _ids_are_in_the_vocabulary(self) -> "Manifest":
        sequences = [ids for each in self.probe for ids in (each.prompt_ids, *(one.ids for one in each.responses))]
        named = [i for ids in sequences for i in ids] + ([] if self.end_of_turn_id is None else [self.end_of_turn_id])
        wrong = next((i for i in named if not 0 <= i < self.vocabulary), None)
        if wrong is not None:
            raise ValueError(f"the id {wrong} is not in the vocabulary of {self.vocabulary}")
        return self

    @model_validator(mode="after")
    def _probe_is_bounded(self) -> "Manifest":
        responses = [(len(each.prompt_ids), len(one.ids)) for each in self.probe for one in each.responses]
        tokens = sum(map(sum, responses))
        if len(responses) > MAX_PROBE_SEQUENCES or tokens > MAX_PROBE_TOKENS:
            raise ValueError(
                f"its probe has {len(responses)} sequences of {tokens} tokens, more than {MAX_PROBE_SEQUENCES} or "
                f"{MAX_PROBE_TOKENS}"
            )
        return self

    @property
    def longest_probe_tokens(self) -> int:
        """Tokens of the longest prompt and response of the probe."""
        return max((len(p.prompt_ids) + len(r.ids) for p in self.probe for r in p.responses), default=0)

    @property
    def choices(self) -> TemplateChoices:
        """What this manifest decides about the chat template."""
        return TemplateChoices(self.template_kwargs, self.response_prefix, self.template_date)

    @property
    def weights_sha256(self) -> str:
        """One hash of all weights. It identifies a policy."""
        own = {name: digest for name, digest in self.files.items() if name.endswith(".safetensors")}
        return sha256_of_text(json.dumps([own, self.adapter_base_files], sort_keys=True))

    @property
    def content_sha256(self) -> str:
        """One hash of all files, configuration and weights. Revisions are derived from it."""
        return sha256_of_text(json.dumps([self.files, self.adapter_base_files], sort_keys=True))

    @property
    def sample_fraction(self) -> float | None:
        """The share of the run that was finished when the checkpoint was saved; None if it is unknown."""
        if self.samples_processed is None or not self.samples_total:
            return None
        return self.samples_processed / self.samples_total


def sha256_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def tokenizer_sha256(vocabulary: Mapping[str, int], probe_ids: Sequence[int]) -> str:
    """Canonical hash of a tokenizer, from the token of every id and from `probe_ids`.

    `probe_ids` are the ids of TOKENIZER_PROBE_TEXT without those that the tokenizer adds, such as BOS. The hash depends
    on no library version and no file format, so that a client can compute it from the tokenizer that it has loaded.
    """
    by_id = sorted((token_id, token) for token, token_id in vocabulary.items())
    return sha256_of_text(json.dumps([by_id, list(probe_ids)], ensure_ascii=True, separators=(",", ":")))


def load_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder. Raises CheckpointError if there is none or it is invalid."""
    path = folder / MANIFEST_NAME
    if not is_folder(folder):
        raise CheckpointError(why_no_folder(folder))
    try:
        found = path.is_file()
        size = path.stat().st_size if found else 0
        text = path.read_bytes() if found and size <= MAX_MANIFEST_BYTES else b""
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): allow this user to read it") from None
    if not found:
        refuse_run_folder(folder)
        command = f"dense-reward adopt {folder} --role sft --run-id NAME"
        raise CheckpointError(
            f"{folder} has no {MANIFEST_NAME}: write one with `{command}` (--role reference for the earlier "
            "checkpoint, --role policy for a model that was trained on the reward)"
        )
    if size > MAX_MANIFEST_BYTES:
        raise CheckpointError(
            f"{path} has {size} bytes, more than {MAX_MANIFEST_BYTES}: it is no manifest, so adopt the checkpoint again"
        )
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"] == ("manifest_version",):
            raise CheckpointError(
                f"{path} is of another version of manifests ({first['input']}, this program reads 1): install the "
                "dense-reward that wrote it, or adopt the checkpoint again"
            ) from None
        place = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{path} is not a manifest: {place + ': ' if place else ''}{first['msg']} (adopt the checkpoint again)"
        ) from None


def files_folder(folder: Path, manifest: Manifest) -> Path:
    """The folder of the checkpoint's files: that of the manifest, or another one that the manifest names.

    Raises CheckpointError if the hub's cache on this machine does not hold the hub id@revision that it names.
    """
    if manifest.source is None:
        return folder
    places = named_folders(folder, manifest.source)
    if not places:
        name, _, revision = manifest.source.partition("@")
        raise CheckpointError(
            f"{folder}: its files, {manifest.source}, are not in the hub's cache of this machine: download them with "
            f"`hf download {name}{' --revision ' + revision if revision else ''}`"
        )
    return next((place for place in places if is_folder(place)), places[0])


def adapter_base_folder(folder: Path, manifest: Manifest) -> Path | None:
    """The folder of an adapter's base model; None if the checkpoint is no adapter.

    If it is not where the manifest says, it is where adapter_config.json says: the hashes tell whether it is the same.
    Raises CheckpointError if it is in neither place.
    """
    name = manifest.adapter_base
    if name is None:
        return None
    places = [*named_folders(folder, name), *_base_of_adapter_config(files_folder(folder, manifest))]
    found = next((place for place in places if is_folder(place)), None)
    if found is None:
        raise CheckpointError(
            f"{folder}: its base model {name} is not there: move or download it there, or name its folder in "
            "adapter_config.json (base_model_name_or_path) and adopt the adapter again"
        )
    return found


def _base_of_adapter_config(files: Path) -> list[Path]:
    try:
        named = json.loads((files / "adapter_config.json").read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [files / str(named)] if isinstance(named, str) and named else []


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Verify the hashes of all files, also those of an adapter's base model.

    Raises CheckpointError, naming the file, if one is missing, has changed, or was added.
    """
    _verify(files_folder(folder, manifest), manifest.files)
    base = adapter_base_folder(folder, manifest)
    if base is not None:
        _verify(base, manifest.adapter_base_files)


def check_pair(sft: Manifest, reference: Manifest, *, allow_unrelated: bool) -> bool:
    """Whether two checkpoints come from one run, in the right order.

    Raises CheckpointError if they cannot be a pair, or if they do not come from one run and `allow_unrelated` is false.
    """
    for name, manifest in (("sft", sft), ("reference", reference)):
        if manifest.role == "token_head":
            raise CheckpointError(
                f"the checkpoint given as {name} is a token head, a reward model of its own: serve it with --token-head"
            )
    check_same_texts(sft, reference)
    if _equal(sft, reference):
        raise CheckpointError(EQUAL_MODELS)
    if (sft.role, reference.role) == ("reference", "sft"):
        raise CheckpointError(
            "the checkpoint given as sft is a reference, and the one given as reference is an sft: swap --sft and "
            "--reference"
        )
    reason = _unrelated(sft, reference)
    if reason is not None and not allow_unrelated:
        raise CheckpointError(f"{reason}: pass --allow-unrelated if this pair is what you want")
    return reason is None


def check_same_texts(sft: Manifest, reference: Manifest) -> None:
    """Raises CheckpointError if ids, chats or ends of turn mean different things to two checkpoints."""
    if sft.tokenizer_sha256 != reference.tokenizer_sha256:
        raise CheckpointError("sft and reference have different tokenizers: their ids mean different things")
    if sft.vocabulary != reference.vocabulary:
        raise CheckpointError(
            f"sft and reference have different vocabularies: {sft.vocabulary} and {reference.vocabulary} output rows"
        )
    if sft.template_sha256 != reference.template_sha256:
        raise CheckpointError(
            "sft and reference have different chat templates: adopt both with --renderer plain (or instruction), or "
            "give both folders one chat template and adopt them again"
        )
    if sft.end_of_turn_id != reference.end_of_turn_id:
        ends = " and ".join(
            "none" if end is None else f"id {end}" for end in (sft.end_of_turn_id, reference.end_of_turn_id)
        )
        raise CheckpointError(
            f"sft and reference have different ends of turn ({ends}): adopt one again with the --end-of-turn of the "
            "other"
        )
    if sft.renderer == "chat":
        _check_choices(sft, reference)


def _check_choices(sft: Manifest, reference: Manifest) -> None:
    """Raises CheckpointError if the two checkpoints render chats differently."""
    for name in ("template_kwargs", "response_prefix", "template_date"):
        values = getattr(sft, name), getattr(reference, name)
        if values[0] != values[1]:
            one, other = ("nothing" if value in (None, {}) else json.dumps(value) for value in values)
            raise CheckpointError(
                f"sft and reference differ in {name} ({one} and {other}), so they would score different texts: adopt "
                f"both again with the same --{name.replace('_', '-')}"
            )


def _equal(sft: Manifest, reference: Manifest) -> bool:
    """Whether both are the same model: equal weights and configurations, or bitwise equal log-probs of one probe."""
    configurations = [[each.files.get(name) for name in CONFIGURATIONS] for each in (sft, reference)]
    same_files = sft.weights_sha256 == reference.weights_sha256 and configurations[0] == configurations[1]
    return same_files or (sft.probe == reference.probe and bool(sft.probe))


def _unrelated(sft: Manifest, reference: Manifest) -> str | None:
    if sft.run_id != reference.run_id:
        return f"sft and reference come from different runs ({sft.run_id} and {reference.run_id})"
    if sft.role != "sft" or reference.role != "reference":
        return f"the checkpoint given as sft is a {sft.role}, the one given as reference a {reference.role}"
    steps = sft.optimiser_step, reference.optimiser_step
    if steps[0] is not None and steps[1] is not None and steps[0] <= steps[1]:
        return f"the sft checkpoint (step {steps[0]}) is not later than the reference (step {steps[1]})"
    return None


def _verify(folder: Path, expected: Mapping[str, str]) -> None:
    check_files_folder(folder)
    verify_hashes(folder, expected, hash_files(folder))


def check_files_folder(folder: Path, named_in: Path | None = None) -> None:
    """Raises CheckpointError if the folder is not there. `named_in` has the manifest that names it."""
    if not is_folder(folder):
        named = f" ({named_in}/manifest.json names that folder)" if named_in not in {None, folder} else ""
        raise CheckpointError(
            f"{folder}: the checkpoint's files are missing{named}: move them back, or adopt them where they are now"
        )
