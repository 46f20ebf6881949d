"""The command `report`: run folders as one HTML file that needs nothing else, neither scripts nor the network.

Every table links to the command that made its numbers. A run's pictures and its pages of heatmaps are inside the file.
"""

import base64
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from dense_reward.checkpoints.atomic_file import write_whole

from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.reports.json_tables import Table, tables_of
from dense_reward_trainer.runs.run_folder import CONFIG_NAME, METRICS_NAME, RECORD_NAME, MetricsLog, RunRecord, read_run

PICTURES = {".svg": "image/svg+xml", ".png": "image/png"}
# Nothing but what is inside the page is loaded: styles, pictures as data, and pages of heatmaps as text.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = """
:root { color-scheme: light dark; --line: #8886; --dim: #8a8a8a; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1rem; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
td { overflow-wrap: anywhere; min-width: 4rem; } th { font-weight: 600; white-space: nowrap; }
.scroll { overflow-x: auto; margin: .3rem 0 1.2rem; } .dim { color: var(--dim); font-size: 13px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; background: #8881; padding: .6rem; }
img { max-width: 100%; background: white; } iframe { width: 100%; height: 24rem; border: 1px solid var(--line); }
@media print { details > summary { display: none; } h2 { break-before: page; } }
"""


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A run folder with its record. `anchor`: its name in the page."""

    folder: Path
    record: RunRecord
    anchor: str


def write_report(folders: Sequence[Path], path: Path) -> int:
    """Writes the page of all runs in these folders, and returns how many there are.

    A folder that is no run stands for all runs below it. Raises ConfigError if there is none, or a result is not JSON.
    """
    runs = list(_runs(folders))
    sections = "\n".join(_section(run) for run in runs)
    title = "Report of " + ("one run" if len(runs) == 1 else f"{len(runs)} runs")
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{_contents(runs)}\n{sections}\n"
        "</body>\n</html>\n"
    )
    write_whole(path, page.encode())
    return len(runs)


def _runs(folders: Iterable[Path]) -> Iterator[FinishedRun]:
    seen: set[Path] = set()
    for folder in folders:
        found = [folder] if (folder / RECORD_NAME).is_file() else sorted(p.parent for p in folder.rglob(RECORD_NAME))
        if not found:
            raise ConfigError(f"{folder} holds no run: name the output_dir of a job, or a folder above several")
        for place in found:
            if place.resolve() not in seen:
                seen.add(place.resolve())
                yield FinishedRun(place, read_run(place), f"run-{len(seen)}")


def _contents(runs: Sequence[FinishedRun]) -> str:
    rows = [
        [
            f'<a href="#{run.anchor}">{escape(str(run.folder))}</a>',
            escape(run.record.job),
            escape(run.record.started_at),
            escape((run.record.commit or "–")[:12]),
        ]
        for run in runs
    ]
    return _html_table(("run", "job", "started", "commit"), rows)


def _section(run: FinishedRun) -> str:
    record = run.record
    parts = [f'<h2 id="{run.anchor}">{escape(record.job)}: {escape(str(run.folder))}</h2>']
    commands = "\n".join(dict.fromkeys(record.commands))
    parts.append(f'<p class="dim">Made by</p><pre id="{run.anchor}-command">{escape(commands)}</pre>')
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    parts.append(f'<p class="dim">commit {escape(record.commit or "unknown")}; {escape(versions)}</p>')
    config = run.folder / CONFIG_NAME
    if config.is_file():
        parts.append(_details("configuration", f"<pre>{escape(_text(config))}</pre>"))
    found = [part for file in sorted(run.folder.glob("*.json")) for part in _result(run, file)]
    found += _last_metrics(run)
    found += [_picture(file) for file in _pictures(run.folder)]
    found += [_heatmap(file) for file in sorted(run.folder.glob("*.html"))]
    return "\n".join(
        [*parts, *(found or ["<p>This run has no result: it has not finished, or its job writes none.</p>"])]
    )


def _text(file: Path) -> str:
    """A file for people to read; what is no UTF-8 is shown as such."""
    return file.read_text("utf-8", errors="replace")


def _result(run: FinishedRun, file: Path) -> Iterator[str]:
    """The tables of a JSON file; its copy of the configuration is left out, and the cards of models are folded."""
    if file.name == RECORD_NAME:
        return
    try:
        content = json.loads(file.read_bytes())
        models = content.pop("models", None) if isinstance(content, dict) else None
        if isinstance(content, dict):
            content.pop("config", None)
        tables = list(tables_of(content))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not JSON ({error}): remove it, or run the job again") from None
    for table in tables:
        yield _table(run, file.name, table)
    if models is not None:
        yield _details("models of the service", "".join(_table(run, file.name, table) for table in tables_of(models)))


def _last_metrics(run: FinishedRun) -> Iterator[str]:
    lines = MetricsLog(run.folder / METRICS_NAME).read()
    if lines:
        last: dict[str, float | None] = {}
        for line in lines:
            last |= line
        yield from (_table(run, f"{METRICS_NAME}, the last value of each", table) for table in tables_of(last))


def _table(run: FinishedRun, source: str, table: Table) -> str:
    title = " › ".join(table.path)
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    link = f'<p class="dim">{escape(source)}, made by <a href="#{run.anchor}-command">this command</a></p>'
    return heading + link + _html_table(table.titles, [[escape(cell) for cell in row] for row in table.rows])


def _html_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _pictures(folder: Path) -> list[Path]:
    """One of each name; the vector picture if there are both."""
    files = [file for suffix in PICTURES for file in folder.glob(f"*{suffix}")]
    return sorted({file.stem: file for file in reversed(files)}.values())


def _picture(file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    name = escape(file.stem)
    source = f"data:{PICTURES[file.suffix]};base64,{data}"
    return f'<figure><img alt="{name}" src="{source}"><figcaption class="dim">{name}</figcaption></figure>'


def _heatmap(file: Path) -> str:
    """A page of heatmaps as it is, in a frame that can neither run scripts nor load anything."""
    page = escape(_text(file))
    return (
        f'<p class="dim">{escape(file.stem)}</p><iframe sandbox title="{escape(file.stem)}" srcdoc="{page}"></iframe>'
    )


def _details(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"
