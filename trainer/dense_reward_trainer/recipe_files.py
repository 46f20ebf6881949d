"""The recipes that ship with the package. Imports the standard library only: a help text lists them."""

from pathlib import Path

from dense_reward_trainer.errors import ConfigError

FOLDER = Path(__file__).parent / "recipes"
# Recipes whose names do not contain the name of their job.
JOB_OF = {"methods": "sweep"}
# Jobs that read the recipes of another job.
READS_THOSE_OF = {"gradient": "dpr"}


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def recipes_of(job: str) -> list[str]:
    """Names of the recipes of a job; the name of a recipe contains that of its job as a word."""
    job = READS_THOSE_OF.get(job, job)
    return [name for name in recipe_names() if job in name.split("_") or JOB_OF.get(name) == job]


def config_path(name_or_path: str, job: str | None = None) -> Path:
    """The configuration file at a path, or the shipped recipe of that name. Raises ConfigError if there is neither.

    The error names the recipes of `job`; None: all of them.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    listed = recipe_names() if job is None else recipes_of(job)
    if name_or_path in listed:
        return FOLDER / f"{name_or_path}.yaml"
    recipes = f"Recipes: {', '.join(listed) or 'none for this job'}"
    if path.is_dir():
        raise ConfigError(f"{name_or_path} is a folder: name a YAML file or a recipe. {recipes}")
    if name_or_path in recipe_names():
        raise ConfigError(f"{name_or_path} is a recipe of another job than {job}. {recipes}")
    near = _nearest(name_or_path, listed)
    raise ConfigError(f"{name_or_path}: no such file, and no recipe of that name.{near} {recipes}")


def _nearest(name: str, listed: list[str]) -> str:
    from difflib import get_close_matches  # noqa: PLC0415 - only for an error

    near = get_close_matches(name, listed, n=1)
    return f" Did you mean {near[0]}?" if near else ""
