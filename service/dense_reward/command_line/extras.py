"""What an extra of this distribution lacks here, and the command that installs it. Imports the standard library only.

The distribution is on no package index, so the command names the folder that this one was installed from.
"""

import json
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DISTRIBUTION = "dense-reward"
CONSTRAINTS = "constraints/default.txt"
EXTRA_OF_SERVICE, EXTRA_OF_TRAINER = "serve", "train"
MISSING_EXTRA = 2
"""The exit code of a command that lacks its extra."""


@contextmanager
def with_advice(command: str, extra: str) -> Iterator[None]:
    """Ends a command that cannot import a library of its extra with how to install it; says so after its help too."""
    try:
        yield
    except ModuleNotFoundError as error:
        lacking = _advice(command, extra)
        if lacking is None:  # the extra is whole, so this is another fault
            raise
        sys.stderr.write(f"{lacking}\n")
        raise SystemExit(MISSING_EXTRA) from error
    except SystemExit as ended:
        lacking = None if ended.code else _advice(command, extra)
        if lacking is not None:
            sys.stderr.write(f"\n{lacking}\n")
        raise


def missing_libraries(extra: str) -> list[str]:
    """The libraries of an extra that are not installed; none if this distribution itself is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    missing = []
    for name in _libraries(extra):
        try:
            version(name)
        except PackageNotFoundError:
            missing.append(name)
    return missing


def install_command(extra: str) -> str:
    """The command that installs the extra into this environment, in the versions that were tested."""
    pip = f"{shlex.quote(sys.executable)} -m pip install"
    folder = _source_folder()
    if folder is None:
        return f"{pip} -c {CONSTRAINTS} '.[{extra}]', in the project's folder"
    constraints = folder / CONSTRAINTS
    pins = f" -c {shlex.quote(str(constraints))}" if constraints.is_file() else ""
    return f"{pip}{pins} {shlex.quote(f'{folder}[{extra}]')}"


def _advice(command: str, extra: str) -> str | None:
    """Two lines that say what the command lacks and how to install it; None if it lacks nothing."""
    missing = missing_libraries(extra)
    if not missing:
        return None
    return (
        f"{command} needs the extra `{extra}`, which is not installed here ({', '.join(missing)}). Install it:\n"
        f"  {install_command(extra)}"
    )


def _libraries(extra: str) -> Iterator[str]:
    """The names that an extra requires, also through other extras of this distribution."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        lines = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return
    for line in lines:
        requirement, _, marker = line.partition(";")
        if re.search(rf"""extra == ["']{extra}["']""", marker) is None:
            continue
        found = re.match(r"\s*([\w.-]+)(?:\[([\w,-]+)\])?", requirement)
        if found is None:
            continue
        if found[1] != DISTRIBUTION:
            yield found[1]
        else:
            for inner in (found[2] or "").split(","):
                yield from _libraries(inner)


def _source_folder() -> Path | None:
    """The folder that pip installed this distribution from, if it is still there (PEP 610)."""
    from importlib.metadata import distribution

    try:
        url: str = json.loads(distribution(DISTRIBUTION).read_text("direct_url.json") or "{}").get("url", "")
    except (ImportError, ValueError):
        return None
    from urllib.parse import unquote, urlsplit

    parts = urlsplit(url)
    folder = Path(unquote(parts.path))
    return folder if parts.scheme == "file" and (folder / "pyproject.toml").is_file() else None
