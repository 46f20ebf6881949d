"""Writes the table of docs/benchmarks.md from bench/results/gpu_day.json: `python -m bench.gpu.report`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.tables import replace_block, table

ROOT = Path(__file__).resolve().parents[2]
PAGE, BLOCK = ROOT / "docs" / "benchmarks.md", "gpu_day"
FILE = ROOT / "bench" / "results" / "gpu_day.json"
SPEEDS = {"speed_15b before": "1.5B, before", "speed_15b": "1.5B", "speed_7b": "7B", "unequal": "1.5B and 0.5B"}
Results = Mapping[str, Any]


def main() -> None:
    replace_block(PAGE, BLOCK, block(json.loads(FILE.read_text())))
    print(f"wrote {PAGE.relative_to(ROOT)}")


def block(results: Results) -> str:
    """Markdown of the speeds, the parts of the engine, and the stages."""
    return "\n\n".join([_speeds(results), _parts(results["variants"]), _stages(results)])


def _speeds(results: Results) -> str:
    head = (
        "models",
        "batch",
        "reward, ms",
        "with kl and entropy",
        "transformers",
        "at its best",
        "share of the matmul peak",
    )
    rows = []
    for stage, name in SPEEDS.items():
        for batch, found in _batches(results[stage], "milliseconds"):
            ms = found["milliseconds"]
            others = [_ms(ms.get(f"transformers {way}")) for way in ("plain", "best")]
            share = f"{found['share_of_matmul']:.2f}"
            rows.append((name, batch, _ms(ms["reward"]), _ms(ms["kl and entropy"]), *others, share))
    return table(head, rows)


def _parts(variants: Results) -> str:
    batches = [(name, found) for name, found in variants.items() if isinstance(found, dict) and "as it is" in found]
    ways = list(batches[0][1])
    rows = [(way, *(_ms(found[way]) for _, found in batches)) for way in ways]
    return table(("1.5B, reward, ms", *(name for name, _ in batches)), rows)


def _stages(results: Results) -> str:
    rows = [
        (name, found["state"], f"{found['seconds']:.0f}" if "seconds" in found else "", _commit(found["commit"]))
        for name, found in results.items()
    ]
    return table(("stage", "state", "seconds", "commit"), rows)


def _batches(stage: Results, key: str) -> list[tuple[str, Results]]:
    return [(name, found) for name, found in stage.items() if isinstance(found, dict) and key in found]


def _commit(name: str) -> str:
    return f"`{name[:9]}`" + (", changed" if name.endswith("-dirty") else "")


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


if __name__ == "__main__":
    main()
