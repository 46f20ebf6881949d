"""bench/results/cpu.json and gpu.json -> the tables of docs/benchmarks.md and docs/pictures/speed.png."""

import statistics
from collections.abc import Iterator, Mapping, Sequence

from bench.speed.cells import Target
from bench.speed.ledger import ROOT
from bench.speed.outcome import AROUND, E_CELLS, figures
from bench.speed.picture import draw_speed
from bench.speed.record import Measured, Results, read_results

PAGE = ROOT / "docs" / "benchmarks.md"
PICTURE = ROOT / "docs" / "pictures" / "speed.png"
PICTURE_LINE = "![Response tokens a second, and shares of the matmul peak](pictures/speed.png)\n\n"
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- figures: `make bench` writes from here -->", "<!-- figures: to here -->"
TARGETS: Mapping[Target, str] = {"cpu": "CPU", "gpu": "GPU"}
CONTESTANTS = ("service", "transformers", "transformers_best", "vllm")
NOT_MEASURED = "not measured"
WORKLOADS = {
    "a": "(a) 8 responses to a prompt, 128 + 128 tokens",
    "b": "(b) 8 responses to a prompt, 512 + 1,024 tokens",
    "c": "(c) one response to a prompt, lengths of GSM8K",
    "d": "(d) one request at a time, 128 + 128 tokens",
}
SHAPES = {"40m": "40M", "05b": "0.5B", "15b": "1.5B", "7b": "7B"}
BAR_CHARACTERS = 24


def write() -> None:
    """The part of the page between its markers, and the picture. Raises ValueError where the page has no markers."""
    results = {target: read_results(RESULTS / f"{target}.json") for target in TARGETS}
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} has no place for figures: it needs the lines {BEGIN} and {END}")
    sections = "\n\n".join(_section(target, results[target]) for target in TARGETS)
    speeds = {name: speeds_of(one) for name, one in _compared(results)}
    shares = {name: one.peak_share() for name, one in _around(results)}
    picture = PICTURE_LINE if speeds or shares else ""
    PAGE.write_text(f"{before}{BEGIN}\n\n{sections}\n\n{picture}{END}{after}", encoding="utf-8")
    print(f"written: {PAGE.relative_to(ROOT)}")
    if picture:
        draw_speed(PICTURE, speeds, shares)
        print(f"written: {PICTURE.relative_to(ROOT)}")


def speeds_of(measured: Measured) -> dict[str, float]:
    """Response tokens a second of each contestant that was measured: its fastest variant, the median round."""
    seconds = {"service": [statistics.median(one.service.seconds for one in measured.rounds)]} | {
        contestant: [
            statistics.median(one.others[name].seconds for one in measured.rounds)
            for name in measured.variants(contestant)
        ]
        for contestant in CONTESTANTS[1:]
    }
    return {name: measured.response_tokens / min(found) for name, found in seconds.items() if found}


def title(cell: str) -> str:
    """Of a cell's name, as people read it."""
    workload, _, rest = cell.partition("_")
    if workload in WORKLOADS:
        return f"{SHAPES[rest]} {WORKLOADS[workload]}"
    return f"0.5B (e) {rest.replace('_', ' ')}"


def _compared(results: Mapping[Target, Results | None]) -> Iterator[tuple[str, Measured]]:
    for one in results.values():
        for name, measured in ({} if one is None else one.cells).items():
            if any(round_.others for round_ in measured.rounds):
                yield title(name), measured


def _around(results: Mapping[Target, Results | None]) -> Iterator[tuple[str, Measured]]:
    cells = {} if results["cpu"] is None else results["cpu"].cells
    for name in (AROUND, *E_CELLS):
        if name in cells:
            yield ("(a) itself" if name == AROUND else name.removeprefix("e_").replace("_", " ")), cells[name]


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
    return _table(("figure", "value"), [(f"`{name}`", _number(value)) for name, value in found.items()])


def _speed_table(cell: str, measured: Measured) -> str:
    speeds = speeds_of(measured)
    fastest = max(speeds.values())
    rows = []
    for name in CONTESTANTS:
        if name in speeds:
            times = 1.0 if name == "service" else measured.ratio(name)
            rows.append((name, _speed(cell, measured, speeds[name]), _bar(speeds[name] / fastest), _number(times)))
        else:
            rows.append((name, NOT_MEASURED, _reason(name, measured), ""))
    return _table((title(cell), "response tokens/s", "", "time, in the service's"), rows)


def _speed(cell: str, measured: Measured, tokens_per_s: float) -> str:
    """With the time of one request where a request is what is waited for."""
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
    return _table(("the service", "share of the matmul peak", ""), rows)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _bar(share: float) -> str:
    return "█" * max(1, round(min(share, 1.0) * BAR_CHARACTERS))


def _number(value: float | None) -> str:
    if value is None:
        return NOT_MEASURED
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
