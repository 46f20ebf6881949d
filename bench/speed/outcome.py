"""The few figures that a run is made for, by name: null where they were not measured. Pure."""

from collections.abc import Mapping

from bench.speed.cells import Target
from bench.speed.record import Results

RATIOS: Mapping[Target, tuple[str, ...]] = {
    "cpu": (
        "a_05b_vs_vllm",
        "a_05b_vs_transformers",
        "a_05b_vs_transformers_best",
        "a_40m_vs_vllm",
        "a_40m_vs_transformers",
        "a_40m_vs_transformers_best",
        "c_05b_vs_vllm",
        "c_05b_vs_transformers",
        "c_05b_vs_transformers_best",
    ),
    "gpu": tuple(f"{cell}_15b_vs_{name}" for cell in "ac" for name in ("vllm", "transformers", "transformers_best")),
}
SHARES: Mapping[Target, tuple[str, ...]] = {
    "cpu": ("a_05b", "b_05b", "a_40m"),
    "gpu": ("a_15b", "b_15b", "a_7b", "b_7b"),
}
AROUND = "a_05b"  # the e cells change one factor of it at a time
E_CELLS = (
    "e_length_1k",
    "e_length_8k",
    "e_group_1",
    "e_group_64",
    "e_vocabulary_32k",
    "e_vocabulary_128k",
    "e_vocabulary_256k",
)


def figures(target: Target, results: Results) -> dict[str, float | None]:
    """Ratios: how many times as long as the service someone takes. Shares: of the matmul peak, or of a client's wait.

    Megabytes: the service's peak memory over what it held after a small request.
    """
    found: dict[str, float | None] = {name: _ratio(name, results) for name in RATIOS[target]}
    found |= {f"peak_share_{cell}": _share(cell, results) for cell in SHARES[target]}
    if target == "gpu":
        return found | {f"peak_extra_mb_{cell}": _extra_mb(cell, results) for cell in ("b_15b", "b_7b")}
    rounding, a_40m = results.rounding, results.cells.get("a_40m")
    return found | {
        "peak_share_min_e": _smallest_share(results),
        "outside_model_share_40m": None if a_40m is None else a_40m.outside_model_share(),
        "peak_extra_mb_b": _extra_mb("b_05b", results),
        "logprob_error_ratio": None if rounding is None else rounding.ratio,
    }


def _ratio(name: str, results: Results) -> float | None:
    cell, _, contestant = name.partition("_vs_")
    measured = results.cells.get(cell)
    return None if measured is None else measured.ratio(contestant)


def _share(cell: str, results: Results) -> float | None:
    measured = results.cells.get(cell)
    return None if measured is None else measured.peak_share()


def _smallest_share(results: Results) -> float | None:
    """Over all of (e) and what it varies; null until every one is measured."""
    shares = [_share(cell, results) for cell in (*E_CELLS, AROUND)]
    known = [share for share in shares if share is not None]
    return min(known) if len(known) == len(shares) else None


def _extra_mb(cell: str, results: Results) -> float | None:
    measured = results.cells.get(cell)
    return None if measured is None else measured.extra_mb()
