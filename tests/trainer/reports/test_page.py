"""The report page: what it holds, that it loads nothing, and that text of runs cannot act in it."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from dense_reward_trainer.cli import main
from dense_reward_trainer.configs.base import JobConfig
from dense_reward_trainer.runs.run_folder import MetricsLog, open_run

PNG = bytes.fromhex("89504e470d0a1a0a")


class Tags(HTMLParser):
    """All start tags with their attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def finished_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("sys.argv", ["dense-reward-train", "evaluate", "config.yaml", "seed=1"])
    open_run("evaluate", JobConfig(output_dir=folder))
    content = {"<b>sft": {"accuracy": {"value": 0.5, "standard_error": 0.1, "count": 4}}}
    (folder / "evaluation.json").write_text(json.dumps(content))
    (folder / "credit.json").write_text(json.dumps({"a": 1, "config": {"service_url": "s3cret"}, "models": [{"b": 2}]}))
    MetricsLog(folder / "metrics.jsonl").append(1, {"loss": 2.0, "first": 7.0})
    MetricsLog(folder / "metrics.jsonl").append(2, {"loss": 1.5})
    (folder / "both.png").write_bytes(PNG)
    (folder / "both.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (folder / "plot.png").write_bytes(PNG)
    (folder / "heatmap.html").write_text("<p>tokens</p><script>alert(1)</script>")
    return folder


def test_a_page_holds_tables_pictures_heatmaps_and_the_command_of_every_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finished_run(tmp_path / "runs" / "one", monkeypatch)
    finished_run(tmp_path / "runs" / "two", monkeypatch)
    out = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "runs"), str(tmp_path / "runs" / "one"), "--output", str(out)]) == 0
    next_step = f"next: open {out.as_uri()} in a browser"
    assert capsys.readouterr().err.strip() == f"finished: {out}, 2 runs; {next_step}"
    page = Tags(out.read_text("utf-8"))
    for shown in ("0.5 ± 0.1", "<b>sft", "dense-reward-train evaluate config.yaml seed=1", "models of the service"):
        assert shown in page.text
    assert re.search(r"loss\s*1\.5", page.text)
    assert "s3cret" not in out.read_text("utf-8")
    anchors = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = [attributes["href"] for attributes in page.named("a")]
    assert links
    assert {(link or "").removeprefix("#") for link in links} <= anchors
    kinds = [(attributes["src"] or "").partition(";")[0] for attributes in page.named("img")]
    assert kinds == ["data:image/svg+xml", "data:image/png"] * 2
    assert len(page.named("iframe")) == 2


def test_a_page_asks_for_nothing_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "report.html"
    assert main(["report", str(finished_run(tmp_path / "one", monkeypatch)), "--output", str(out)]) == 0
    page = Tags(out.read_text("utf-8"))
    for forbidden in ("script", "link", "object", "base"):
        assert not page.named(forbidden)
    for _, attributes in page.tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    (frame,) = page.named("iframe")
    assert "sandbox" in frame
    assert frame["sandbox"] is None
    policy = [attributes for attributes in page.named("meta") if attributes.get("http-equiv")]
    assert policy[0]["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_a_run_without_results_says_so_and_bytes_that_are_no_text_are_shown(tmp_path: Path) -> None:
    open_run("evaluate", JobConfig(output_dir=tmp_path / "one"))
    (tmp_path / "one" / "config.yaml").write_bytes(b"seed: \xff1")
    out = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "one"), "--output", str(out)]) == 0
    text = Tags(out.read_text("utf-8")).text
    assert "This run has no result: it has not finished" in text
    assert "seed: \N{REPLACEMENT CHARACTER}1" in text


@pytest.mark.parametrize("content", ["{", "[" * 100_000])
@pytest.mark.parametrize("damage", ["nothing", "evaluation.json"])
def test_what_cannot_be_reported_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], damage: str, content: str
) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    if damage != "nothing":
        (finished_run(folder, monkeypatch) / damage).write_text(content)
    assert main(["report", str(folder), "--output", str(tmp_path / "report.html")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert ("holds no run" if damage == "nothing" else "is not JSON") in error
    assert not (tmp_path / "report.html").exists()
