"""The page served at /: what it holds, and what a strict policy and careful code keep out."""

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from importlib.resources import files
from typing import get_args

import pytest
from dense_reward.heatmap import DEFAULT_PALETTE, PALETTES
from dense_reward.schemas import SignalName

WEB = files("dense_reward") / "web"
VOID = {"br", "meta", "link", "input"}

Attributes = dict[str, str | None]


@dataclass
class Elements(HTMLParser):
    """All elements of a page in order, with their attributes; fails where tags are not balanced."""

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
    assert local == {"web/page.css", "web/page.js"}
    assert all((WEB / address.removeprefix("web/")).is_file() for address in local)
    assert {"docs", "metrics"} <= set(addresses)
    assert not any(re.search(r"https?:|//[a-z]", text(name)) for name in ("index.html", "page.css"))
    assert not re.search(r"https?:", text("page.js"))


def test_the_picture_stands_in_a_frame_that_may_do_nothing(page: Elements) -> None:
    (frame,) = page.all("iframe")
    assert frame["sandbox"] == ""
    assert frame.get("title")
    assert "srcdoc" in text("page.js")


@pytest.mark.parametrize(
    "sink", ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("]
)
def test_no_text_is_ever_parsed_as_markup_or_code(sink: str) -> None:
    assert sink not in text("page.js")


def test_every_field_has_a_label_and_every_identity_is_unique(page: Elements) -> None:
    fields = [a["id"] for tag in ("textarea", "select", "input") for a in page.all(tag)]
    assert sorted(label["for"] or "" for label in page.all("label")) == sorted(str(name) for name in fields)
    assert len(page.ids()) == len(set(page.ids()))


def test_the_script_asks_only_for_elements_that_the_page_has(page: Elements) -> None:
    asked = set(re.findall(r'byId\("([^"]+)"\)', text("page.js")))
    assert asked
    assert asked <= set(page.ids())


def test_it_offers_the_signals_and_palettes_that_the_service_has(page: Elements) -> None:
    assert options(page, "signal") == list(get_args(SignalName))
    assert options(page, "palette") == list(PALETTES)
    assert options(page, "palette")[0] == DEFAULT_PALETTE


def test_the_example_is_a_worked_addition_and_a_twin_with_one_wrong_digit() -> None:
    found = dict(re.findall(r'(prompt|response|other): "([^"]+)"', text("page.js")))
    lines, env_name = found["response"].split("\\n"), found["other"].split("\\n")
    for line in lines[:-1]:
        sum_, _, total = line.split(" ")[0].partition("=")
        assert sum(map(int, sum_.split("+"))) == int(total)
    assert re.findall(r"\d+", found["prompt"]) == ["478", "365"]
    assert lines[-1] == f"#### {478 + 365}"
    assert sum(one != other for one, other in zip("\n".join(lines), "\n".join(env_name), strict=True)) == 1
