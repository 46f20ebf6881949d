"""What a heatmap shows: rows of tokens with one signal, the colour scale that they share, and each row's summary.

Knows nothing of HTML, SVG or terminals, nor where the numbers come from.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from dense_reward.heatmap.palette import DEFAULT_PALETTE, palette_named
from dense_reward.reward import Summary, summarise

SCALE_PERCENTILE = 99.5
SMALLEST_SCALE = 0.01  # nats: rounding noise must not be painted in full colours

MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        "reward": "log π_sft − log π_ref: what the token gained in log-probability "
        "between the reference and the finished SFT model",
        "centred": "reward minus the reward that the SFT model itself expects at that position: "
        "0 on average under its own samples",
        "sft_logprob": "log-probability of the token under the finished SFT model: 0 is certain",
        "reference_logprob": "log-probability of the token under the reference model: 0 is certain",
        "kl": "KL(π_sft ‖ π_ref) at that position: the reward that the SFT model itself expects there",
        "entropy": "entropy of the SFT model at that position",
        "return_to_go": "sum of the signal from the token to the end of the response",
    }
)


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that could have stood at a position: its text, its log-probability under the SFT model, its reward."""

    text: str
    logprob: float
    reward: float


@dataclass(frozen=True, slots=True)
class HeatmapRow:
    """A response of T tokens. Raises ValueError where an array does not have T entries or holds NaN or infinity.

    `pieces` are consecutive slices of the echoed text, "" for a token whose character ends in a later token;
    `values` is the shown signal, `details` further arrays by name, for tooltips.
    """

    title: str
    prompt: str
    pieces: tuple[str, ...]
    token_ids: tuple[int, ...]
    values: tuple[float, ...]
    details: Mapping[str, tuple[float, ...]]
    alternatives: tuple[tuple[Alternative, ...], ...] | None = None

    def __post_init__(self) -> None:
        self._check_length("token_ids", self.token_ids)
        if self.alternatives is not None:
            self._check_length("alternatives", self.alternatives)
            offered = [number for some in self.alternatives for one in some for number in (one.logprob, one.reward)]
            self._check_finite("alternatives", offered)
        for name, numbers in {"values": self.values, **self.details}.items():
            self._check_length(name, numbers)
            self._check_finite(name, numbers)

    def _check_length(self, name: str, entries: Sequence[object]) -> None:
        if len(entries) != len(self.pieces):
            raise ValueError(
                f"row {self.title!r}: {name} has {len(entries)} entries for {len(self.pieces)} pieces; "
                "give one per token"
            )

    def _check_finite(self, name: str, numbers: Sequence[float]) -> None:
        for number in numbers:
            if not math.isfinite(number):
                raise ValueError(f"row {self.title!r}: {name} holds {number}; every number must be finite")


@dataclass(frozen=True, slots=True)
class Heatmap:
    """Rows on one colour scale, which saturates at -scale and +scale (in `unit`).

    `meaning` says in a line what the signal is; the signals in MEANINGS have one, others must bring theirs.
    Raises ValueError where palette or signal is unknown or the scale is no positive number.
    """

    rows: tuple[HeatmapRow, ...]
    signal: str
    palette: str
    scale: float
    meaning: str = ""
    unit: str = "nats"

    def __post_init__(self) -> None:
        palette_named(self.palette)
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"the scale is {self.scale}; it must be finite and above 0")
        if not self.meaning and self.signal not in MEANINGS:
            raise ValueError(f"signal {self.signal!r} is none of {', '.join(MEANINGS)}; say its meaning")

    @property
    def caption(self) -> str:
        return self.meaning or MEANINGS[self.signal]


def shared_scale(rows: Sequence[HeatmapRow]) -> float:
    """Where colour saturates, the same on both sides of zero and for all rows, in the unit of the values.

    The 99.5th percentile of |value| over all rows, to two significant digits: in a short answer one wrong token stands
    out from the noise, in long ones a few outliers do not bleach the rest.
    At least 0.01, so that identical checkpoints look alike.
    """
    sizes = np.abs(np.array([value for row in rows for value in row.values], dtype=np.float64))
    if not sizes.any():
        return 1.0
    # Where nearly all are 0 the percentile is too, and the few that are not would all saturate.
    robust = float(np.percentile(sizes, SCALE_PERCENTILE)) or float(sizes.max())
    return max(float(f"{robust:.1e}"), SMALLEST_SCALE)


def build(
    rows: Sequence[HeatmapRow],
    *,
    signal: str,
    palette: str = DEFAULT_PALETTE,
    meaning: str = "",
    unit: str = "nats",
) -> Heatmap:
    """A heatmap of these rows on the scale that they share. Raises ValueError as Heatmap does."""
    return Heatmap(tuple(rows), signal, palette, shared_scale(rows), meaning, unit)


def summary(row: HeatmapRow) -> Summary:
    """The numbers printed beside a row."""
    return summarise(np.array(row.values, dtype=np.float32))


def lowest(row: HeatmapRow) -> int | None:
    """The first index that holds the row's lowest value; None where the row has no tokens."""
    return int(np.argmin(row.values)) if row.values else None


def signed(number: float, digits: int = 2) -> str:
    """The number with its sign, "0.00" where it rounds to zero, in powers of ten from 100,000 on."""
    text = f"{number:+.3g}" if abs(number) >= 1e5 else f"{number:+.{digits}f}"
    return text if float(text) else text.lstrip("+-")


def typeset(number: float, digits: int = 2) -> str:
    """The same with a true minus sign, for print."""
    return signed(number, digits).replace("-", "−")


def plain(number: float) -> str:
    """Three digits after the point and no plus sign: for numbers beside the shown one."""
    return typeset(number, 3).removeprefix("+")


def tick_labels(scale: float) -> tuple[str, ...]:
    """Labels of the colour bar at its ends, its middle and half-way between, lowest first."""
    return tuple(f"{share * scale:+.3g}".replace("-", "−") if share else "0" for share in (-1, -0.5, 0, 0.5, 1))
