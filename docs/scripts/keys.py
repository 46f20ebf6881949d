"""The page of recipe keys: what each job's configuration accepts."""

import importlib
import re
from importlib import resources
from itertools import takewhile

from dense_reward_trainer.commands import JOBS
from dense_reward_trainer.recipe_files import recipe_names
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from docs.scripts.markdown import code, page, prose, table
from docs.scripts.type_names import models_in, type_name

COMMAND = re.compile(r"#\s+dense-reward|#  ")
INTRODUCTION = """
A job of `dense-reward-train` reads one YAML file and `key=value` overrides. This page lists every key of every job. A
dot leads into a nested group: `data.source=mine.jsonl`. Values are YAML, so `null` removes a value, and a list is
`'[1, 4]'`. Unknown keys are refused, with the nearest known one. A key without a default must be given.

The finished run keeps its whole configuration in `config.yaml` of its folder.
"""


def recipes_page() -> str:
    """The shipped recipes, a section for each job, and one for each group of keys that jobs share."""
    groups: dict[str, type[BaseModel]] = {}
    jobs = [_job(name, groups) for name in JOBS]
    done: set[str] = set()
    nested: list[str] = []
    while todo := [name for name in groups if name not in done]:
        for name in todo:
            done.add(name)
            nested.append(f"### {name}\n\n{_first_line(groups[name])}\n\n{_rows(groups[name], groups)}")
    shared = "## Groups of keys\n\nA key whose type is one of these groups has the keys of the group below it."
    return page("Recipe keys", INTRODUCTION, _recipes(), *jobs, shared, *sorted(nested))


def _job(name: str, groups: dict[str, type[BaseModel]]) -> str:
    module, _, kind = JOBS[name].config.partition(":")
    config: type[BaseModel] = getattr(importlib.import_module(module), kind)
    help_text = prose(JOBS[name].help[:1].upper() + JOBS[name].help[1:])
    return f"## {name}\n\n{help_text}.\n\n{_rows(config, groups)}"


def _rows(model: type[BaseModel], groups: dict[str, type[BaseModel]]) -> str:
    rows = [_row(name, field, groups) for name, field in model.model_fields.items()]
    return table(("key", "type", "default", "meaning"), rows)


def _row(name: str, field: FieldInfo, groups: dict[str, type[BaseModel]]) -> tuple[str, str, str, str]:
    kind = prose(type_name(field.annotation))
    for model in models_in(field.annotation):
        groups[model.__name__] = model
        kind = kind.replace(model.__name__, f"[{model.__name__}](#{model.__name__.lower()})")
    return code(name), kind, _default(field), prose(field.description or "")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "its own defaults"
    if value is None:
        return code("null")
    if isinstance(value, bool):
        return code(str(value).lower())
    return code(str(list(value) if isinstance(value, tuple) else value))


def _first_line(model: type[BaseModel]) -> str:
    text = (model.__doc__ or "").strip()
    return prose(text.split("\n\n")[0]) if text else ""


def _recipes() -> str:
    folder = resources.files("dense_reward_trainer") / "recipes"
    rows = []
    for name in recipe_names():
        lines = (folder / f"{name}.yaml").read_text("utf-8").splitlines()
        comment = takewhile(lambda line: line.startswith("# ") and not COMMAND.match(line), lines)
        text = " ".join(line.removeprefix("# ") for line in comment)
        rows.append((f"[{name}](../../trainer/dense_reward_trainer/recipes/{name}.yaml)", prose(text)))
    return "## Recipes that ship\n\n" + table(("recipe", "what it is for"), rows)
