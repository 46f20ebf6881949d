"""The last line of a job: what is finished, and the command that comes next, which can be pasted. Must not know jobs.

A word in capitals, such as EARLIER_CHECKPOINT, is one that only the user knows.
"""

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml
from pydantic_core import to_jsonable_python

from dense_reward_trainer.configs.base import JobConfig, load_config, read_yaml
from dense_reward_trainer.configs.evaluate import EvaluateConfig
from dense_reward_trainer.recipe_files import config_path, recipes_of
from dense_reward_trainer.runs.run_folder import CONFIG_NAME, command_line, without_secrets

PROGRAM = "dense-reward-train"


def finished(result: Path, *next_step: str) -> str:
    """One line: `finished: PATH; next: COMMAND`. `next_step`: the words of the line after `next: `; none: no next."""
    words = " ".join(next_step)
    return f"finished: {result}" + (f"; next: {words}" if words else "")


def serve(run: Path, references: Iterable[str]) -> str:
    """The command that serves the references of a run; if it wrote none, with a checkpoint that the user names."""
    if any(True for _ in references):
        return f"dense-reward serve --run {quoted(run)}"
    return f"dense-reward serve --sft {quoted(run / 'checkpoints' / 'sft')} --reference EARLIER_CHECKPOINT"


def evaluate(policies: Mapping[str, Path], held_out: Path | None, keys: Mapping[str, object]) -> str:
    """The command that compares policies, the first of which is the start of the others."""
    start = next(iter(policies.values()))
    run = sft_run_of(start)
    if held_out is None and run is not None:
        held_out = run[0] / "held_out.jsonl"
    wanted = {"policies": dict(policies), "held_out": held_out or Path("HELD_OUT.jsonl"), **keys}
    return job("evaluate", EvaluateConfig, wanted, default="evaluate_full", match="held_out")


def report_page(run: Path) -> str:
    """The command that writes the tables, plots and settings of a run into one page."""
    return f"{PROGRAM} report {quoted(run)} --output {quoted(run / 'report.html')}"


def job(name: str, kind: type[JobConfig], keys: Mapping[str, object], *, default: str, match: str) -> str:
    """The command of a job, from a shipped recipe, with those keys that differ from the recipe.

    `keys`: dotted key -> value. The recipe is the one that has the same value at the key `match`, else `default`.
    """
    wanted = _plain(keys.get(match))
    recipe = next((one for one in recipes_of(name) if _at(read_yaml(config_path(one)), match) == wanted), default)
    base = load_config(kind, config_path(recipe)).model_dump(mode="json")
    words = [override(key, value) for key, value in keys.items() if _plain(value) != _at(base, key)]
    return " ".join([PROGRAM, name, recipe, *words])


def again(name: str, config: JobConfig, keys: Mapping[str, object]) -> str:
    """The command that was typed, with these keys changed; None removes a key. CONFIG if no command line was typed."""
    source, *overrides = config.typed or ("CONFIG",)
    kept = [word for word in overrides if not any(_is_of(word.partition("=")[0].strip(), key) for key in keys)]
    changed = [override(key, value) for key, value in keys.items() if value is not None]
    return " ".join([PROGRAM, name, command_line([source, *kept]), *changed])


def more_in(folder: Path, suffix: str) -> Path:
    """A run folder beside this one: a run with other keys may not go on in the same folder."""
    return folder.with_name(f"{folder.name}_{suffix}")


def sft_run_of(checkpoint: Path) -> tuple[Path, Mapping[str, object]] | None:
    """The folder of the SFT run that wrote a checkpoint, and its configuration; None if it is not of an SFT run."""
    folder = checkpoint.parent.parent
    if checkpoint.parent.name != "checkpoints" or not (folder / CONFIG_NAME).is_file():
        return None
    values = read_yaml(folder / CONFIG_NAME)
    return (folder, values) if {"data", "milestones"} <= values.keys() else None


def override(key: str, value: object) -> str:
    """`key=value` as one word of a shell, the value as YAML."""
    text = yaml.safe_dump(_plain(value), default_flow_style=True, width=float("inf"), sort_keys=False)
    return quoted(f"{key}={text.removesuffix(chr(10)).removesuffix('...').strip()}")


def quoted(value: object) -> str:
    """A value as one word of a shell."""
    return shlex.quote(str(value))


def _is_of(key: str, parent: str) -> bool:
    return key == parent or key.startswith(f"{parent}.") or parent.startswith(f"{key}.")


def _plain(value: object) -> object:
    plain = to_jsonable_python(value)
    return without_secrets(plain) if isinstance(plain, str) else plain


def _at(values: object, key: str) -> object:
    for name in key.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values
