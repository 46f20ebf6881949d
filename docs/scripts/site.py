"""Builds the documentation site: stages the pages, runs Zensical, and checks what it built.

On GitHub, pages link to each other and to files of the repository. Staging keeps the former, and adds a page for each
of the latter, so that the site is whole without the repository. Needs Zensical; `make docs` runs it in its own
environment. Imports nothing of the project.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from os.path import normpath, relpath
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES, SITE = ROOT / "build" / "pages", ROOT / "build" / "site"
# Pages outside docs/, and their names on the site.
OTHERS = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "README.md": "readme.md",
    "helm/dense-reward/README.md": "chart.md",
}
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
OF_THE_HOST = re.compile(r"\[([^\]]+)\]\(\.\./\.\./security/[^)]*\)")  # a form of the repository's host
FENCE = re.compile(r"^( *```.*?^ *```\s*?$)", re.MULTILINE | re.DOTALL)
LIST_AFTER_TEXT = re.compile(r"^(?!\s*(?:[-*]|\d+\.) |\s*\||$)(.+)\n(?=(?:[-*]|1\.) )", re.MULTILINE)
LANGUAGES = {".py": "python", ".sh": "sh", ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".toml": "toml"}
STATIC = {".json", ".png", ".svg", ".txt"}


@dataclass(slots=True)
class Staged:
    """Names of pages on the site, by their path in the repository; and files that pages link to."""

    pages: dict[str, str]
    files: dict[str, str] = field(default_factory=dict)

    def target(self, source: str, link: str) -> str:
        """A link of the page `source` as the site has it. Raises ValueError if it leads nowhere."""
        name, mark, anchor = link.partition("#")
        if "://" in link or not name or link.startswith("mailto:"):
            return link
        path = normpath(Path(source).parent / name)
        if path not in self.pages and not (ROOT / path).exists():
            raise ValueError(f"{source}: {link} leads nowhere")
        place = self.pages.get(path) or self._file(path)
        return relpath(place, Path(self.pages[source]).parent) + mark + anchor

    def _file(self, path: str) -> str:
        if path == "docs/decisions":
            return "decisions/index.md"
        if path.startswith("docs/pictures/") or path == "docs/llms.txt":
            return path.removeprefix("docs/")
        static = Path(path).suffix in STATIC and (ROOT / path).is_file()
        shown = re.sub(r"(^|/)\.", r"\1", path)  # Zensical leaves out hidden files
        self.files[path] = f"files/{shown}" if static else f"files/{shown}.md"
        return self.files[path]


def main() -> int:
    """Returns exit code 0 once the site is built and whole."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.rmtree(SITE, ignore_errors=True)
    stage()
    built = subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=ROOT, check=False)
    if built.returncode:
        return built.returncode
    for page in PAGES.rglob("*.md"):  # llmstxt.org: each page also as Markdown, at its address + .md
        shutil.copy(page, SITE / page.relative_to(PAGES).with_suffix(".html.md"))
    return 0


def stage() -> None:
    """Writes build/pages: every page, the pictures, llms.txt, and what pages link to."""
    own = {str(page.relative_to(ROOT)): str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    staged = Staged({**own, **OTHERS})
    for source in staged.pages:
        write(staged.pages[source], page_text(staged, source))
    write("decisions/index.md", decisions())
    shutil.copytree(DOCS / "pictures", PAGES / "pictures", ignore=shutil.ignore_patterns("*.py"))
    for name in ("site.css", "site.js"):
        shutil.copy(DOCS / name, PAGES)
    write("llms.txt", re.sub(r"\.md\)", ".html.md)", (DOCS / "llms.txt").read_text("utf-8")))
    for path, place in staged.files.items():
        if place.endswith(".md"):
            write(place, file_page(path))
        else:
            (PAGES / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, PAGES / place)


def write(place: str, text: str) -> None:
    file = PAGES / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, "utf-8")


def page_text(staged: Staged, source: str) -> str:
    """A page with the links of the site. Python-Markdown, unlike GitHub, needs an empty line before a list."""
    parts = FENCE.split(OF_THE_HOST.sub(r"\1", (ROOT / source).read_text("utf-8")))
    for index in range(0, len(parts), 2):
        text = LINK.sub(lambda found: found[1] + staged.target(source, found[2]) + found[3], parts[index])
        parts[index] = LIST_AFTER_TEXT.sub(r"\1\n\n", text)
    return "".join(parts)


def decisions() -> str:
    rows = [f"- [{title(page)}]({page.name})" for page in sorted((DOCS / "decisions").glob("*.md"))]
    return "# Decisions\n\nOne page for each decision: context, decision, consequences.\n\n" + "\n".join(rows) + "\n"


def title(page: Path) -> str:
    return page.read_text("utf-8").partition("\n")[0].removeprefix("# ")


def file_page(path: str) -> str:
    """A page that shows a file of the repository, or lists a folder."""
    head = f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n"
    if (ROOT / path).is_dir():
        return head + "A folder of the repository:\n\n" + "\n".join(f"- `{name}`" for name in listing(path)) + "\n"
    language = LANGUAGES.get(Path(path).suffix, "text")
    return f"{head}````{language}\n{(ROOT / path).read_text('utf-8').rstrip()}\n````\n"


def listing(path: str) -> Iterator[str]:
    for entry in sorted((ROOT / path).iterdir()):
        if not entry.name.startswith(("__", ".")):
            yield entry.name + ("/" if entry.is_dir() else "")


if __name__ == "__main__":
    sys.exit(main())
