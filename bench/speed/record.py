"""What a run leaves behind: the shapes of its records, in JSON. Pure but for reading and writing them."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue

from bench.speed.cells import Cell
from bench.speed.flops import flops_of


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Timed(_Strict):
    """`latencies_s`: of each request. `compute_s`: what the service says its models took.

    `rms_nats`: root mean square difference to the service's rewards.
    """

    latencies_s: tuple[float, ...]
    compute_s: float | None = None
    rms_nats: float | None = None

    @property
    def seconds(self) -> float:
        return sum(self.latencies_s)


class Peak(_Strict):
    """The fastest matmul of a moment."""

    flops_per_s: float
    shape: str


class Round(_Strict):
    """`peaks`: before and after the service. `not_measured`: who, and why. `others`: by variant.

    `extra_mb`: the service's peak memory over what it held after a small request. `reward_std_nats`: how far rewards
    spread, for `rms_nats` to be compared with.
    """

    service: Timed
    peaks: tuple[Peak, Peak]
    others: dict[str, Timed] = {}
    not_measured: dict[str, str] = {}
    extra_mb: float | None = None
    reward_std_nats: float

    @property
    def peak_flops_per_s(self) -> float:
        """The larger of the two: one that was disturbed must not flatter a share."""
        return max(peak.flops_per_s for peak in self.peaks)


class Rounding(_Strict):
    """Root mean square errors of log-probs in bfloat16, both models pooled, against transformers in float32."""

    tokens: int
    service_rms_nats: float
    transformers_rms_nats: float

    @property
    def ratio(self) -> float:
        return self.service_rms_nats / self.transformers_rms_nats


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
        """The names under which a contestant was measured in every round."""
        names = set.intersection(*(set(one.others) for one in self.rounds))
        return sorted(name for name in names if name.rstrip("_0123456789") == contestant)

    def ratio(self, contestant: str) -> float | None:
        """How many times as long as the service it takes: median of paired ratios, of its fastest variant."""
        ratios = [
            statistics.median(one.others[name].seconds / one.service.seconds for one in self.rounds)
            for name in self.variants(contestant)
        ]
        return min(ratios, default=None)

    def peak_share(self) -> float:
        """Median over rounds of the work's FLOPs in a second over the matmul peak."""
        return statistics.median(self.flops / one.service.seconds / one.peak_flops_per_s for one in self.rounds)

    def outside_model_share(self) -> float:
        """Of the time that a client waits, what the models do not compute in."""
        return statistics.median(1 - (one.service.compute_s or 0.0) / one.service.seconds for one in self.rounds)

    def extra_mb(self) -> float | None:
        return max((one.extra_mb for one in self.rounds if one.extra_mb is not None), default=None)


class Circumstances(_Strict):
    """What figures must share to stand in one file."""

    commit: str
    dtype: str
    device: str
    processor: str


class Results(_Strict):
    """The file bench/results/cpu.json or gpu.json; the figures of `outcome` are written beside these."""

    circumstances: Circumstances
    settings: dict[str, JsonValue]
    cells: dict[str, Measured] = {}
    rounding: Rounding | None = None


def read_results(file: Path) -> Results | None:
    """None where there is none."""
    if not file.exists():
        return None
    return Results.model_validate_json(file.read_bytes(), extra="ignore")


def write_results(file: Path, figures: Mapping[str, float | None], results: Results) -> None:
    """`figures` come first, where they are looked for."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {**figures, **results.model_dump(mode="json")}
    file.write_text(json.dumps(content, indent=1) + "\n")
