"""Results of a run: its records in JSON, and the published figures, null if not measured."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue

from bench.speed.workload import Cell, Target, flops_of

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
        "d_05b_vs_transformers_best",
    ),
    "gpu": tuple(f"{cell}_15b_vs_{name}" for cell in "ac" for name in ("vllm", "transformers", "transformers_best")),
}
SHARES: Mapping[Target, tuple[str, ...]] = {
    "cpu": ("a_05b", "b_05b", "a_40m"),
    "gpu": ("a_15b", "b_15b", "a_7b", "b_7b"),
}
BASE_CELL = "a_05b"
"""The cell from which each e cell differs in one factor."""
E_CELLS = (
    "e_length_1k",
    "e_length_8k",
    "e_group_1",
    "e_group_64",
    "e_vocabulary_32k",
    "e_vocabulary_128k",
    "e_vocabulary_256k",
)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Timed(_Strict):
    """Seconds of each request. `compute_s`: the service's own figure for its models.

    `rms_nats`: root mean square difference from the service's rewards.
    """

    latencies_s: tuple[float, ...]
    compute_s: float | None = None
    rms_nats: float | None = None

    @property
    def seconds(self) -> float:
        return sum(self.latencies_s)


class Peak(_Strict):
    """The fastest matmul at one moment."""

    flops_per_s: float
    shape: str


class Round(_Strict):
    """One round of a cell.

    `peaks`: before and after the service. `others`: by variant. `not_measured`: the reason, by variant.
    `extra_mb`: the service's peak memory minus what it held after a small request. `reward_std_nats`: standard
    deviation of rewards, a scale for `rms_nats`.
    """

    service: Timed
    peaks: tuple[Peak, Peak]
    others: dict[str, Timed] = {}
    not_measured: dict[str, str] = {}
    extra_mb: float | None = None
    reward_std_nats: float

    @property
    def peak_flops_per_s(self) -> float:
        """The larger of both peaks, because a disturbed measurement must not improve the share."""
        return max(peak.flops_per_s for peak in self.peaks)


class Rounding(_Strict):
    """Root mean square errors of log-probs in bfloat16, both models pooled, against transformers in float32."""

    tokens: int
    service_rms_nats: float
    transformers_rms_nats: float

    @property
    def ratio(self) -> float:
        return self.service_rms_nats / self.transformers_rms_nats


class Conversations(_Strict):
    """Tokens that the service computed for conversations that begin alike, and how many of them are distinct."""

    requests: int
    turns: int
    computed_tokens: int
    distinct_tokens: int

    @property
    def share(self) -> float:
        return self.computed_tokens / self.distinct_tokens


class Measured(_Strict):
    """All rounds of a cell."""

    shape: str
    prompts: int
    response_tokens: int
    flops: int
    rounds: tuple[Round, ...]

    @classmethod
    def of(cls, cell: Cell, rounds: list[Round]) -> "Measured":
        return cls(
            shape=cell.shape_name,
            prompts=len(cell.lengths),
            response_tokens=cell.response_tokens,
            flops=flops_of(cell.shape, cell.lengths),
            rounds=tuple(rounds),
        )

    def variants(self, contestant: str) -> list[str]:
        """Names of a contestant's variants that were measured in every round."""
        names = set.intersection(*(set(one.others) for one in self.rounds))
        return sorted(name for name in names if name.rstrip("_0123456789") == contestant)

    def ratio(self, contestant: str) -> float | None:
        """Time of the fastest variant over the service's: median over rounds of the ratio within a round."""
        ratios = [
            statistics.median(one.others[name].seconds / one.service.seconds for one in self.rounds)
            for name in self.variants(contestant)
        ]
        return min(ratios, default=None)

    def peak_share(self) -> float:
        """Median over rounds of the work's FLOPs per second, as a share of the matmul peak."""
        return statistics.median(self.flops / one.service.seconds / one.peak_flops_per_s for one in self.rounds)

    def outside_model_share(self) -> float:
        """Share of a client's waiting time in which the models do not compute."""
        return statistics.median(1 - (one.service.compute_s or 0.0) / one.service.seconds for one in self.rounds)

    def extra_mb(self) -> float | None:
        return max((one.extra_mb for one in self.rounds if one.extra_mb is not None), default=None)


class Circumstances(_Strict):
    """Figures in one file must share these."""

    commit: str
    dtype: str
    device: str
    processor: str


class Results(_Strict):
    """The file bench/results/cpu.json or gpu.json, which also holds `figures`."""

    circumstances: Circumstances
    settings: dict[str, JsonValue]
    cells: dict[str, Measured] = {}
    rounding: Rounding | None = None
    conversations: Conversations | None = None


def read_results(file: Path) -> Results | None:
    """Returns None if the file does not exist."""
    if not file.exists():
        return None
    return Results.model_validate_json(file.read_bytes(), extra="ignore")


def write_results(file: Path, figures: Mapping[str, float | None], results: Results) -> None:
    """Writes the figures first, where a reader looks for them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"dtype": results.circumstances.dtype, **figures, **results.model_dump(mode="json")}
    file.write_text(json.dumps(content, indent=1) + "\n")


def figures(target: Target, results: Results) -> dict[str, float | None]:
    """Returns the published figures by name.

    Ratios: a contestant's time over the service's. Shares: of the matmul peak, or of a client's waiting time.
    Megabytes: the service's peak memory minus what it held after a small request.
    """
    found: dict[str, float | None] = {name: _ratio(name, results) for name in RATIOS[target]}
    found |= {f"peak_share_{cell}": _share(cell, results) for cell in SHARES[target]}
    if target == "gpu":
        return found | {f"peak_extra_mb_{cell}": _extra_mb(cell, results) for cell in ("b_15b", "b_7b")}
    rounding, conversations, a_40m = results.rounding, results.conversations, results.cells.get("a_40m")
    return found | {
        "peak_share_min_e": _smallest_share(results),
        "outside_model_share_40m": None if a_40m is None else a_40m.outside_model_share(),
        "peak_extra_mb_b": _extra_mb("b_05b", results),
        "logprob_error_ratio": None if rounding is None else rounding.ratio,
        "conversation_share": None if conversations is None else conversations.share,
    }


def _ratio(name: str, results: Results) -> float | None:
    cell, _, contestant = name.partition("_vs_")
    measured = results.cells.get(cell)
    return None if measured is None else measured.ratio(contestant)


def _share(cell: str, results: Results) -> float | None:
    measured = results.cells.get(cell)
    return None if measured is None else measured.peak_share()


def _smallest_share(results: Results) -> float | None:
    """Smallest share over the e cells and their base; None until all are measured."""
    shares = [_share(cell, results) for cell in (*E_CELLS, BASE_CELL)]
    known = [share for share in shares if share is not None]
    return min(known) if len(known) == len(shares) else None


def _extra_mb(cell: str, results: Results) -> float | None:
    measured = results.cells.get(cell)
    return None if measured is None else measured.extra_mb()
