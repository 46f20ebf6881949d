"""Every path of the repository that a document names exists. Decisions and the log are exempt: they name old paths."""

import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OLD = {ROOT / "docs" / "log.md", *(ROOT / "docs" / "decisions").glob("*.md")}
PAGES = sorted({ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")} - OLD)
FOLDERS = (
    ".ci",
    ".github",
    "bench",
    "constraints",
    "docker",
    "docs",
    "examples",
    "helm",
    "service",
    "tests",
    "trainer",
)
NOT_YET = {"bench/results/gpu.json"}  # written by `make bench-gpu`, which was not run yet
LINK = re.compile(r"\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```.*?\n(.*?)^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
PLACE = re.compile(r"[\w.-]+(?:/[\w.*-]+)*/?")
MODULE = re.compile(r"(?:bench|dense_reward|dense_reward_trainer)(?:\.\w+)+")


def prose(text: str) -> str:
    """The page without its code blocks."""
    return BLOCK.sub("", text)


def broken_links(page: Path) -> Iterator[str]:
    """Links to files, and to headings, that do not exist; links to other sites are not followed."""
    for target in LINK.findall(prose(page.read_text("utf-8"))):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (heading and heading not in anchors(file)):
            yield target


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub writes them into addresses."""
    headings = re.findall(r"^#+ (.+)$", prose(page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing_paths(text: str) -> Iterator[str]:
    """Files, folders and modules in backticks and code blocks that the repository does not have."""
    for code in (*CODE.findall(prose(text)), *BLOCK.findall(text)):
        for word in code.split():
            exists = known_module(word) if MODULE.fullmatch(word) and not word.endswith(".py") else known(word)
            if not exists and word not in NOT_YET:
                yield word


def known(word: str) -> bool:
    """False for a word that looks like a path of the repository but does not exist. FILE.py can be in any folder."""
    if not PLACE.fullmatch(word):
        return True
    if word.startswith(tuple(f"{folder}/" for folder in FOLDERS)):
        return any(ROOT.glob(word.rstrip("/")))
    return not word.endswith(".py") or any(f"/{file}".endswith(f"/{word}") for file in python_files())


def known_module(name: str) -> bool:
    """Whether a dotted name is a module of the project, or a name in one."""
    whole, (parent, _, last) = module_file(name), name.rpartition(".")
    if whole is not None:
        return True
    holder = module_file(parent)
    return holder is not None and re.search(rf"\b{last}\b", holder.read_text("utf-8")) is not None


def module_file(name: str) -> Path | None:
    place = name.replace(".", "/")
    files = (
        f"{folder}{place}{ending}" for folder in ("", "service/", "trainer/") for ending in (".py", "/__init__.py")
    )
    return next((ROOT / file for file in files if file in python_files()), None)


@cache
def python_files() -> frozenset[str]:
    return frozenset(
        str(file.relative_to(ROOT)) for folder in FOLDERS for file in (ROOT / folder).rglob("*.py") if file.is_file()
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    assert not list(broken_links(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_in_code_exists(page: Path) -> None:
    assert not list(missing_paths(page.read_text("utf-8")))


def test_a_file_that_moved_is_noticed() -> None:
    text = "`bench/no_such.py`, `no_such.py`, `python -m bench.no_such`, `docs/no/such/`, `runs/mine`, `settings.py`"
    text += "\n```sh\npython bench/not.py\n```\n"
    assert list(missing_paths(text)) == [
        "bench/no_such.py",
        "no_such.py",
        "bench.no_such",
        "docs/no/such/",
        "bench/not.py",
    ]


def test_pip_installs_this_repository_in_versions_that_were_tested() -> None:
    lines = [
        (page.name, " ".join(line.split()))
        for page in PAGES
        for line in re.findall(r"pip\s+install[^`\n]*(?:\n[^`\n]+)?", page.read_text("utf-8"))
    ]
    ours = [(page, line) for page, line in lines if "'.[" in line.partition("#")[0]]
    assert len(ours) >= 5
    sources = [path for room in ("service", "trainer", "docs", "helm", "docker") for path in (ROOT / room).rglob("*")]
    texts = {str(path): path.read_text("utf-8") for path in sources if path.suffix in {".py", ".md", ".yaml"}}
    assert [path for path, text in texts.items() if "'dense-reward[" in text] == [], "no index has the package"
    assert [(page, line) for page, line in ours if " constraints/" not in line] == []


PIP = re.compile(r"pip install(?:[^\n`#|;]|\n(?=[ \t]*-c|\s*'\.))*")
EXTRA = re.compile(r"\.\[([\w,]+)\]")


def pip_lines() -> Iterator[tuple[Path, str]]:
    """Every pip command in code and documents that a user can meet."""
    for folder in ("service", "trainer", "docs", "examples", "docker", "helm"):
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in {".py", ".md", ".yaml", ".sh", ".txt"} and "decisions" not in file.parts:
                yield from ((file, found) for found in PIP.findall(file.read_text("utf-8")))
    yield from ((ROOT / "README.md", found) for found in PIP.findall((ROOT / "README.md").read_text("utf-8")))


def test_no_pip_line_names_what_no_index_has() -> None:
    """This distribution is on no index: it is installed from its folder, with extras that it has."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    found = [*pip_lines()]
    assert len(found) > 10
    for file, line in found:
        assert not re.search(r"(?<![\w/-])dense-reward(?![\w/-])", line), f"{file.relative_to(ROOT)}: {line}"
        for named in EXTRA.findall(line):
            assert set(named.split(",")) <= set(extras), f"{file.relative_to(ROOT)}: {line}"
