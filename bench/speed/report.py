"""Writes the tables of docs/benchmarks.md and docs/pictures/speed.png from bench/results/cpu.json and gpu.json."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.speed.results import BASE_CELL, E_CELLS, Measured, Results, figures, read_results
from bench.speed.workload import Target
from bench.tables import replace_block, table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
PAGE, BLOCK = ROOT / "docs" / "benchmarks.md", "figures"
PICTURE = ROOT / "docs" / "pictures" / "speed.png"
PICTURE_LINE = "![Response tokens a second, and shares of the matmul peak](pictures/speed.png)"
TARGETS: Mapping[Target, str] = {"cpu": "CPU", "gpu": "GPU"}
NOT_MEASURED = "not measured"
WORKLOADS = {
    "a": "(a) 8 responses to a prompt, 128 + 128 tokens",
    "b": "(b) 8 responses to a prompt, 512 + 1,024 tokens",
    "c": "(c) one response to a prompt, lengths of GSM8K",
    "d": "(d) one request at a time, 128 + 128 tokens",
}
SHAPES = {"40m": "40M", "05b": "0.5B", "15b": "1.5B", "7b": "7B"}
BAR_CHARACTERS = 24
COLOURS = {
    "service": "#1f5fa8",
    "transformers": "#c9c9c9",
    "transformers_best": "#8c8c8c",
    "vllm": "#e0a33a",
}
"""Colour of each contestant, in the order of the tables."""
BAR_HEIGHT = 0.8


def write() -> None:
    """Replaces the block of the page and the picture. Raises ValueError if the page has no such block."""
    results = read()
    replace_block(PAGE, BLOCK, block(results))
    print(f"wrote {PAGE.relative_to(ROOT)}")
    if _has_cells(results):
        speeds = {title: speeds_of(one) for title, one in _compared(results)}
        shares = {title: one.peak_share() for title, one in _varied(results)}
        draw(PICTURE, speeds, shares)
        print(f"wrote {PICTURE.relative_to(ROOT)}")


def read() -> dict[Target, Results | None]:
    return {target: read_results(RESULTS / f"{target}.json") for target in TARGETS}


def block(results: Mapping[Target, Results | None]) -> str:
    """Returns the Markdown of all tables."""
    sections = [_section(target, results[target]) for target in TARGETS]
    return "\n\n".join([*sections, *([PICTURE_LINE] if _has_cells(results) else [])])


def speeds_of(measured: Measured) -> dict[str, float]:
    """Response tokens per second of each measured contestant: its fastest variant, in the median round."""
    _, *others = COLOURS
    seconds = {"service": [statistics.median(one.service.seconds for one in measured.rounds)]} | {
        contestant: [
            statistics.median(one.others[name].seconds for one in measured.rounds)
            for name in measured.variants(contestant)
        ]
        for contestant in others
    }
    return {name: measured.response_tokens / min(found) for name, found in seconds.items() if found}


def title(cell: str) -> str:
    """Returns the title of a cell in the tables."""
    workload, _, rest = cell.partition("_")
    if workload in WORKLOADS:
        return f"{SHAPES[rest]} {WORKLOADS[workload]}"
    return f"0.5B (e) {rest.replace('_', ' ')}"


def _has_cells(results: Mapping[Target, Results | None]) -> bool:
    return any(True for _ in _compared(results)) or any(True for _ in _varied(results))


def _compared(results: Mapping[Target, Results | None]) -> Iterator[tuple[str, Measured]]:
    """Cells with other contestants, for the picture."""
    for one in results.values():
        for name, measured in ({} if one is None else one.cells).items():
            if any(round_.others for round_ in measured.rounds):
                yield title(name), measured


def _varied(results: Mapping[Target, Results | None]) -> Iterator[tuple[str, Measured]]:
    """The e cells and their base, for the picture."""
    cells = {} if results["cpu"] is None else results["cpu"].cells
    for name in (BASE_CELL, *E_CELLS):
        if name in cells:
            yield ("(a) itself" if name == BASE_CELL else name.removeprefix("e_").replace("_", " ")), cells[name]


def _section(target: Target, results: Results | None) -> str:
    if results is None:
        return f"### {TARGETS[target]}\n\n{NOT_MEASURED.capitalize()}."
    here = results.circumstances
    about = f"{here.processor}, {results.settings.get('threads')} threads, {here.dtype}, commit {here.commit[:12]}."
    tables = [_speed_table(name, one) for name, one in results.cells.items() if any(r.others for r in one.rounds)]
    return "\n\n".join(
        [f"### {TARGETS[target]}", about, _figure_table(target, results), *tables, _share_table(results)]
    )


def _figure_table(target: Target, results: Results) -> str:
    found = figures(target, results)
    return table(("figure", "value"), [(f"`{name}`", _number(value)) for name, value in found.items()])


def _speed_table(cell: str, measured: Measured) -> str:
    speeds = speeds_of(measured)
    fastest = max(speeds.values())
    rows = []
    for name in COLOURS:
        if name in speeds:
            times = 1.0 if name == "service" else measured.ratio(name)
            rows.append((name, _speed(cell, measured, speeds[name]), _bar(speeds[name] / fastest), _number(times)))
        else:
            rows.append((name, NOT_MEASURED, _reason(name, measured), ""))
    return table((title(cell), "response tokens/s", "", "time relative to the service"), rows)


def _speed(cell: str, measured: Measured, tokens_per_s: float) -> str:
    """Formats a speed; for (d), in which a client waits for each request, adds the time of a request."""
    request_s = measured.response_tokens / measured.prompts / tokens_per_s
    return f"{tokens_per_s:,.0f}" + (f" ({_number(request_s)} s a request)" if cell.startswith("d_") else "")


def _reason(contestant: str, measured: Measured) -> str:
    found = {
        reason
        for one in measured.rounds
        for name, reason in one.not_measured.items()
        if name.rstrip("_0123456789") == contestant
    }
    return "; ".join(sorted(found)).replace("|", "\\|")


def _share_table(results: Results) -> str:
    rows = [(title(name), _number(one.peak_share()), _bar(one.peak_share())) for name, one in results.cells.items()]
    return table(("service", "share of the matmul peak", ""), rows)


def _bar(share: float) -> str:
    return "█" * max(1, round(min(share, 1.0) * BAR_CHARACTERS))


def _number(value: float | None) -> str:
    if value is None:
        return NOT_MEASURED
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def draw(file: Path, speeds: Mapping[str, Mapping[str, float]], shares: Mapping[str, float]) -> None:
    """Draws response tokens per second by workload and contestant, and shares of the matmul peak by e cell."""
    figure = Figure(figsize=(12, 1.5 + 0.7 * max(len(speeds), len(shares) / 2, 2)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_speeds(left, speeds)
    _draw_shares(right, shares)
    figure.savefig(file, dpi=120)


def _draw_speeds(axes: Axes, speeds: Mapping[str, Mapping[str, float]]) -> None:
    height = BAR_HEIGHT / len(COLOURS)
    for number, (contestant, colour) in enumerate(COLOURS.items()):
        places = [row + number * height for row, found in enumerate(speeds.values()) if contestant in found]
        values = [found[contestant] for found in speeds.values() if contestant in found]
        bars = axes.barh(places, values, height, color=colour, label=contestant, align="edge")
        axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
    _label(axes, list(speeds), "response tokens a second")
    axes.set_xscale("log")
    axes.set_xlim(left=1)
    axes.margins(x=0.1)
    if speeds:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(COLOURS), frameon=False, fontsize=8)


def _draw_shares(axes: Axes, shares: Mapping[str, float]) -> None:
    places = [row + BAR_HEIGHT / 4 for row in range(len(shares))]
    bars = axes.barh(places, list(shares.values()), BAR_HEIGHT / 2, color=COLOURS["service"], align="edge")
    axes.bar_label(bars, fmt="{:.2f}", padding=3, fontsize=8)
    _label(axes, list(shares), "service's share of the matmul peak, 0.5B")
    axes.set_xlim(0, 1.1)


def _label(axes: Axes, names: Sequence[str], xlabel: str) -> None:
    axes.set_yticks([row + BAR_HEIGHT / 2 for row in range(len(names))], names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(xlabel)
    axes.spines[["top", "right"]].set_visible(False)
