"""The files of the page served at /: whole, small, from the service alone, and without a way from text to code."""

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from importlib.resources import files
from typing import get_args

import pytest
from dense_reward.heatmap import DEFAULT_PALETTE, PALETTES
from dense_reward.schemas import ArrayName, SignalName

WEB = files("dense_reward") / "http" / "web"
MODULES = sorted(file.name for file in WEB.iterdir() if file.name.endswith(".js"))
TEXTS = sorted(file.name for file in WEB.iterdir() if file.name.endswith((".js", ".css", ".html")))
VOID = {"br", "meta", "link", "input"}
WRITTEN_BY_THE_SERVICE = {"web/palettes.css"}
MOST_LINES, LONGEST_LINE, MOST_BYTES = 400, 120, 120_000

Attributes = dict[str, str | None]


@dataclass
class Elements(HTMLParser):
    """All elements of a page in order, with their attributes. Fails if tags are not balanced."""

    found: list[tuple[str, Attributes]] = field(default_factory=list)
    _open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        assert not (self._open and self._open[-1] in ("script", "style") and data.strip()), "inline code"

    def all(self, tag: str) -> list[Attributes]:
        return [attributes for name, attributes in self.found if name == tag]

    def ids(self) -> list[str]:
        return [identity for _, attributes in self.found if (identity := attributes.get("id"))]


def text(name: str) -> str:
    return (WEB / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page() -> Elements:
    reader = Elements()
    reader.feed(text("index.html"))
    reader.close()
    assert reader._open == []
    return reader


def options(page: Elements, select: str) -> list[str | None]:
    start = next(at for at, (_, attributes) in enumerate(page.found) if attributes.get("id") == select)
    values = []
    for tag, attributes in page.found[start + 1 :]:
        if tag != "option":
            break
        values.append(attributes.get("value"))
    return values


def test_the_page_runs_under_a_policy_without_inline_code(page: Elements) -> None:
    names = {name for _, attributes in page.found for name in attributes}
    assert "style" not in names
    assert not {name for name in names if name.startswith("on")}
    assert page.all("style") == []


def test_its_files_come_from_the_service_itself_and_exist(page: Elements) -> None:
    addresses = [a.get("href") for a in page.all("link") + page.all("a")] + [s.get("src") for s in page.all("script")]
    local = {address for address in addresses if address and address.startswith("web/")}
    assert local == {"web/page.css", "web/result.css", "web/palettes.css", "web/page.js"}
    assert all((WEB / address.removeprefix("web/")).is_file() for address in local - WRITTEN_BY_THE_SERVICE)
    assert {"docs", "metrics"} <= set(addresses)


@pytest.mark.parametrize("name", TEXTS)
def test_no_file_names_an_address_outside_the_service(name: str) -> None:
    namespaces = text(name).replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|[\"'(]//[a-z]|@import", namespaces)


@pytest.mark.parametrize("name", TEXTS)
def test_a_file_can_be_read_without_a_build_step(name: str) -> None:
    lines = text(name).splitlines()
    assert len(lines) <= MOST_LINES
    assert max(map(len, lines)) <= LONGEST_LINE


def test_the_page_is_small() -> None:
    assert sum(len(text(name).encode()) for name in TEXTS) <= MOST_BYTES


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_modules_that_exist_and_names_that_they_export(name: str) -> None:
    for names, source in re.findall(r'^import \{([^}]+)\} from "\./([^"]+)";', text(name), re.MULTILINE):
        exported = set(re.findall(r"^export (?:async )?(?:function|class|const)\*? (\w+)", text(source), re.MULTILINE))
        wanted = {entry.split(" as ")[0].strip() for entry in names.split(",") if entry.strip()}
        assert wanted <= exported, source
        used = {entry.split(" as ")[-1].strip() for entry in names.split(",") if entry.strip()}
        assert all(len(re.findall(rf"\b{entry}\b", text(name))) > 1 for entry in used), "an import that is not used"


@pytest.mark.parametrize(
    "sink",
    ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "srcdoc", "setHTML"],
)
def test_no_text_is_ever_parsed_as_markup_or_code(sink: str) -> None:
    assert not [name for name in MODULES if sink in text(name)]


def test_every_field_has_a_label_and_every_identity_is_unique(page: Elements) -> None:
    fields = [a for tag in ("textarea", "select", "input") for a in page.all(tag)]
    labelled = {label.get("for") for label in page.all("label")}
    for attributes in fields:
        wrapped = attributes.get("type") in ("radio", "checkbox") or attributes.get("id") == "row"
        assert wrapped or "aria-label" in attributes or attributes.get("id") in labelled, attributes
    assert len(page.ids()) == len(set(page.ids()))


def test_the_modules_ask_only_for_elements_that_the_page_has(page: Elements) -> None:
    asked = {name for module in MODULES for name in re.findall(r'byId\("([^"]+)"\)', text(module))}
    assert asked
    assert asked <= set(page.ids())


def test_it_offers_the_palettes_and_signals_that_the_service_has(page: Elements) -> None:
    assert options(page, "palette") == list(PALETTES)
    assert options(page, "palette")[0] == DEFAULT_PALETTE
    described = re.findall(r"^  \"?([\w-]+)\"?: \{ high:", text("signals.js"), re.MULTILINE)
    assert described == list(PALETTES)
    signals = set(re.findall(r"^  (\w+): \{$", text("signals.js"), re.MULTILINE))
    assert signals >= set(get_args(SignalName))
    assert signals <= set(get_args(ArrayName))
