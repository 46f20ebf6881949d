"""Job configurations: a YAML file and `key.sub=value` overrides -> one frozen object; unknown keys are refused.

Every knob of a job is here or in a class that is named here. Must not import torch: the command line parses before it
loads anything heavy.
"""

import difflib
import types
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin

import yaml
from dense_reward.text.encode import RendererName
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dense_reward_trainer.data.sources import DataSource
from dense_reward_trainer.errors import ConfigError

Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
# Names become folders.
MilestoneName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class JobOptions(BaseModel):
    """A part of a configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class JobConfig(JobOptions):
    """What every job has. `resume_may_change` names the keys that leave the result as it is."""

    resume_may_change: ClassVar[frozenset[str]] = frozenset({"output_dir"})

    output_dir: Path = Field(description="The run folder: log, plot and checkpoints. The same folder again resumes.")


class ScratchOptions(JobOptions):
    """A small Llama with random weights and a byte-level BPE tokenizer of its own, digits apart."""

    vocabulary: int = Field(default=512, ge=260, description="At most this many ids: 4 special, 256 bytes, merges.")
    hidden_size: int = Field(default=128, ge=8)
    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=4, ge=1)
    kv_heads: int | None = Field(default=None, ge=1, description="Key and value heads; null: as many as heads.")
    intermediate_size: int = Field(default=384, ge=8)
    max_position_embeddings: int = Field(default=256, ge=8, description="The longest sequence, in tokens.")
    tie_embeddings: bool = True

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of twice the {self.heads} heads")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} kv_heads evenly")
        return self


class LoraOptions(JobOptions):
    """Low-rank adapters on a frozen base model (arXiv 2106.09685)."""

    r: int = Field(default=16, ge=1, description="Rank.")
    alpha: int = Field(default=32, ge=1, description="The adapter's output is scaled by alpha / r.")
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    target_modules: str | tuple[str, ...] = Field(
        default="all-linear", description="`all-linear`, or names of the layers that get an adapter."
    )


class SftConfig(JobConfig):
    """Supervised fine-tuning: which demonstrations, which model, and when checkpoints are written."""

    resume_may_change: ClassVar[frozenset[str]] = frozenset(
        {"output_dir", "save_every_steps", "log_every_steps", "threads"}
    )

    data: DataSource
    base_model: str | None = Field(default=None, description="Folder or hub id[@revision] to start from.")
    scratch: ScratchOptions | None = Field(default=None, description="Start from nothing instead of a base model.")
    lora: LoraOptions | None = Field(default=None, description="Train adapters; null: train every weight.")
    renderer: RendererName | None = Field(
        default=None, description="chat, plain or instruction; null: chat for a base model, plain from scratch."
    )
    train_on: Literal["response", "all_assistant"] = Field(
        default="response", description="Learn the last response, or every turn of the assistant."
    )
    milestones: dict[MilestoneName, Fraction] = Field(
        default={"reference": 0.5},
        description="Checkpoints on the way: name -> fraction of the samples that the whole run processes.",
    )

    epochs: int = Field(default=1, ge=1)
    max_steps: int | None = Field(default=None, ge=1, description="Stop after this many optimiser steps; null: epochs.")
    batch_size: int = Field(default=32, ge=1, description="Sequences per device and forward pass.")
    gradient_accumulation: int = Field(default=1, ge=1, description="Forward passes per optimiser step.")
    learning_rate: float = Field(default=2e-5, gt=0.0)
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0.0)
    adam_beta2: float = Field(default=0.999, gt=0.0, lt=1.0)
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    max_length_tokens: int | None = Field(
        default=None,
        ge=2,
        description="Longer demonstrations are refused, or left out with data.skip_bad; null: the model's own limit.",
    )
    group_by_length: bool = Field(default=False, description="Batches of similar lengths: less padding.")
    seed: int = Field(default=0, ge=0, description="Of the initial weights and of the order of the samples.")

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="bfloat16 computes in it; weights that are trained stay float32, the base of an adapter does not.",
    )
    gradient_checkpointing: bool = Field(default=False, description="Less memory for about a fifth more time.")
    threads: int | None = Field(default=None, ge=1, description="CPU threads; null: torch's choice.")

    save_every_steps: int = Field(default=100, ge=1, description="How often a killed run can be taken up again.")
    log_every_steps: int = Field(default=10, ge=1)
    eval_every_steps: int | None = Field(
        default=None, ge=1, description="Loss on the held-out demonstrations, and at the end; null: never."
    )

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if (self.base_model is None) == (self.scratch is None):
            raise ValueError("give either base_model or scratch: what training starts from")
        if self.lora is not None and self.scratch is not None:
            raise ValueError("lora needs a base_model: a model from scratch has nothing to adapt")
        if "sft" in self.milestones:
            raise ValueError("a milestone cannot be called sft: that is the finished checkpoint's name")
        return self


Config = TypeVar("Config", bound=JobConfig)


def load_config(cls: type[Config], path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, with `key.sub=value` overrides (values are YAML) applied in order.

    Raises ConfigError, naming the key, for a file that is no YAML mapping, an unknown key or a value out of range.
    """
    values = _read(path)
    for override in overrides:
        _override(values, override)
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        lines = [_explain(cls, tuple(fault["loc"]), fault["type"], fault["msg"]) for fault in error.errors()]
        raise ConfigError(f"{path}: " + "; ".join(lines)) from None


def recipe_names() -> list[str]:
    """The recipes that ship with the package."""
    folder = resources.files("dense_reward_trainer") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def config_path(name_or_path: str) -> Path:
    """A configuration file by path, or a shipped recipe by its bare name. Raises ConfigError where there is neither."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    if name_or_path in recipe_names():
        return Path(str(resources.files("dense_reward_trainer") / "recipes" / f"{name_or_path}.yaml"))
    raise ConfigError(f"{name_or_path}: no such file, and no recipe of that name: {', '.join(recipe_names())}")


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe subset; a key given twice is an error, not the last one's silent win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = [key for key in keys if keys.count(key) > 1]
        if repeated:
            raise yaml.MarkedYAMLError(problem=f"the key {repeated[0]!r} is given twice", problem_mark=node.start_mark)
        mapping: dict[object, object] = super().construct_mapping(node, deep)
        return mapping


def _parse(text: str) -> object:
    return yaml.load(text, Loader=_UniqueKeys)


def _read(path: Path) -> dict[str, object]:
    try:
        values = _parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values")
    return values


def _override(values: dict[str, object], override: str) -> None:
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"override {override!r} is not of the form key.sub=value")
    try:
        value = _parse(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is no YAML: {' '.join(str(error).split())}") from None
    place = values
    for name in names[:-1]:
        inner = place.get(name)
        if inner is None:
            inner = place[name] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"override {override!r}: {name} is {inner!r}, which has no keys of its own")
        place = inner
    place[names[-1]] = value


def _explain(cls: type[BaseModel], location: tuple[int | str, ...], kind: str, message: str) -> str:
    """One fault of a configuration in words; an unknown key with the nearest known one."""
    key = ".".join(map(str, location))
    if kind != "extra_forbidden":
        return f"{key}: {message}" if key else message.removeprefix("Value error, ")
    known = _known_keys(cls, location[:-1])
    near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    prefix = ".".join(map(str, location[:-1])) + "." if location[:-1] else ""
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(sorted(known))}"
    return f"unknown key {key}: {hint}"


def _known_keys(cls: type[BaseModel], location: Iterable[int | str]) -> list[str]:
    for name in location:
        field = cls.model_fields.get(str(name))
        inner = None if field is None else _model_in(field.annotation)
        if inner is None:
            return []
        cls = inner
    return list(cls.model_fields)


def _model_in(annotation: object) -> type[BaseModel] | None:
    """The model class in an annotation such as `Options` or `Options | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType):
        return next((found for part in get_args(annotation) if (found := _model_in(part)) is not None), None)
    return None


def changed_keys(started: Mapping[str, object], now: Mapping[str, object], may_change: frozenset[str]) -> list[str]:
    """Dotted names of the keys whose values differ between two dumped configurations, but for those of `may_change`."""
    changed = []
    for key in sorted({*started, *now} - may_change):
        before, after = started.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changed += [f"{key}.{name}" for name in changed_keys(before, after, frozenset())]
        elif before != after:
            changed.append(key)
    return changed
