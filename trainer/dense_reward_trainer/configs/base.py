"""Loads a job's configuration: a YAML file and `key.sub=value` overrides -> one frozen object. Refuses unknown keys.

Must not import torch: the command line checks a configuration before it imports anything slow.
"""

import difflib
import types
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from dense_reward_trainer.errors import ConfigError

Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
FractionOrStart = Annotated[float, Field(ge=0.0, lt=1.0)]
# The largest seed that all libraries take is that of numpy's older generator, which transformers seeds.
Seed = Annotated[int, Field(ge=0, lt=2**32)]
# A name that becomes part of a path, so it cannot hold a slash or start with a dot.
SafeName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]

Tracker = Literal["tensorboard", "wandb", "trackio"]
REPORT_TO = (
    "Also log to these trackers, by their own settings (such as WANDB_PROJECT); metrics.jsonl is always written."
)


class JobOptions(BaseModel):
    """Base of a configuration and of its nested parts: frozen, no unknown keys, no values in error messages."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class JobConfig(JobOptions):
    """Base of every job's configuration. `resume_may_change`: keys that do not change the result of a run."""

    resume_may_change: ClassVar[frozenset[str]] = frozenset({"output_dir"})

    output_dir: Path = Field(
        description="The run folder: log, plot and checkpoints. A job with the same folder resumes the run."
    )

    _typed: tuple[str, ...] = PrivateAttr(default=())

    @property
    def typed(self) -> tuple[str, ...]:
        """CONFIG and the overrides, as they were typed; empty if no command line was."""
        return self._typed

    def typed_as(self, words: tuple[str, ...]) -> Self:
        """This configuration, which remembers how it was typed."""
        self._typed = words
        return self

    @property
    def reads_only(self) -> bool:
        """Whether the job only reports what is finished: it may look at the folder of a job that is running."""
        return False


Config = TypeVar("Config", bound=JobConfig)


def load_config(cls: type[Config], path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, with `key.sub=value` overrides (values are YAML) applied in order.

    Raises ConfigError if the file is not a YAML mapping, a key is unknown or a value is out of range; it names the key.
    """
    values = read_yaml(path)
    for override in overrides:
        _override(values, override)
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        lines = [_explain(cls, tuple(fault["loc"]), fault["type"], fault["msg"]) for fault in error.errors()]
        raise ConfigError(f"{path}: " + "; ".join(lines)) from None


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe subset. A repeated key is an error; PyYAML would silently use its last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = [key for key in keys if keys.count(key) > 1]
        if repeated:
            raise yaml.MarkedYAMLError(problem=f"the key {repeated[0]!r} is given twice", problem_mark=node.start_mark)
        mapping: dict[object, object] = super().construct_mapping(node, deep)
        return mapping


def _parse(text: str) -> object:
    return yaml.load(text, Loader=_UniqueKeys)


def read_yaml(path: Path) -> dict[str, object]:
    """The mapping in a YAML file. Raises ConfigError if there is none."""
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
        raise ConfigError(f"override {override!r} is not of the form key.sub=value, such as epochs=2")
    try:
        value = _parse(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"override {override!r}: the value is not valid YAML: {' '.join(str(error).split())}"
        ) from None
    mapping = values
    for name in names[:-1]:
        inner = mapping.get(name)
        if inner is None:
            inner = mapping[name] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"override {override!r}: {name} is {inner!r}, which has no keys")
        mapping = inner
    mapping[names[-1]] = value


def _explain(cls: type[BaseModel], location: tuple[int | str, ...], kind: str, message: str) -> str:
    """One line for one pydantic error; for an unknown key, it suggests the nearest known key."""
    key = ".".join(map(str, location))
    if kind != "extra_forbidden":
        return f"{key}: {message}" if key else message.removeprefix("Value error, ")
    known = _known_keys(cls, location[:-1])
    near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    prefix = ".".join(map(str, location[:-1])) + "." if location[:-1] else ""
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(sorted(known))}"
    return f"unknown key {key}: {hint}"


def _known_keys(cls: type[BaseModel], location: Iterable[int | str]) -> list[str]:
    """Keys of the nested configuration at `location`; none if it is not a configuration."""
    annotation: object = cls
    for name in location:
        annotation = _inner(annotation, str(name))
    model = _model_in(annotation)
    return [] if model is None else list(model.model_fields)


def _inner(annotation: object, name: str) -> object:
    """The annotation at a key of a configuration, or of the values of a dict of them; None if there is none."""
    model = _model_in(annotation)
    if model is not None:
        field = model.model_fields.get(name)
        return None if field is None else field.annotation
    return get_args(annotation)[1] if get_origin(annotation) is dict else None


def _model_in(annotation: object) -> type[BaseModel] | None:
    """The model class in an annotation such as `Options` or `Options | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType):
        return next((found for part in get_args(annotation) if (found := _model_in(part)) is not None), None)
    return None


def changed_keys(started: Mapping[str, object], now: Mapping[str, object], may_change: frozenset[str]) -> list[str]:
    """Dotted names of the keys whose values differ between two dumped configurations, except those in `may_change`.

    `may_change`: names of keys, whose sub-keys may change too, or dotted patterns such as `regimes.*.seeds`.
    """
    return list(changed_values(started, now, may_change))


def changed_values(
    started: Mapping[str, object], now: Mapping[str, object], may_change: frozenset[str]
) -> dict[str, tuple[object, object]]:
    """`changed_keys` -> the value before and the value now; None for a value that is not there."""
    changed: dict[str, tuple[object, object]] = {}
    for key in sorted({*started, *now}):
        before, after = started.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            inner = changed_values(before, after, frozenset())
            changed |= {f"{key}.{name}": values for name, values in inner.items()}
        elif before != after:
            changed[key] = before, after
    return {
        name: values
        for name, values in changed.items()
        if not any(fnmatchcase(name, one) or name.startswith(f"{one}.") for one in may_change)
    }
