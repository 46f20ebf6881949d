"""The content of a heatmap: rows of tokens with one signal, their common colour scale, and each row's summary.

Knows nothing of HTML, SVG or terminals.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from dense_reward.heatmap.palette import DEFAULT_PALETTE, palette_named
from dense_reward.reward import Summary, summarise

SCALE_PERCENTILE = 99.5
SMALLEST_SCALE = 0.01  # nats: below it, rounding noise would get full colours

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
        "varentropy": "variance of the SFT model's log-probability at that position",
    }
)
HEAD_MEANING = (
    "value of the token head after the token: what differs between answers to one prompt counts, not the sign"
)
HEAD_UNIT = "log-odds"


@dataclass(frozen=True, slots=True)
class HeatmapAlternative:
    """Another likely token at a position: its text, its log-probability under the SFT model, and its reward."""

    text: str
    logprob: float
    reward: float


@dataclass(frozen=True, slots=True)
class HeatmapRow:
    """A response of T tokens. Raises ValueError if an array does not have T entries, or holds NaN or infinity.

    `pieces`: consecutive slices of the response's text, "" for a token whose character ends in a later token.
    `values`: the shown signal. `details`: other arrays by name, for tooltips.
    """

    title: str
    prompt: str
    pieces: tuple[str, ...]
    token_ids: tuple[int, ...]
    values: tuple[float, ...]
    details: Mapping[str, tuple[float, ...]]
    alternatives: tuple[tuple[HeatmapAlternative, ...], ...] | None = None

    def __post_init__(self) -> None:
        self._check_length("token_ids", self.token_ids)
        if self.alternatives is not None:
            self._check_length("alternatives", self.alternatives)
            numbers = [number for some in self.alternatives for one in some for number in (one.logprob, one.reward)]
            self._check_finite("alternatives", numbers)
        for name, entries in {"values": self.values, **self.details}.items():
            self._check_length(name, entries)
            self._check_finite(name, entries)

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

    `meaning`: one line that explains the signal; required for a signal that is not in MEANINGS.
    Raises ValueError if palette or signal is unknown, or the scale is not a finite number above 0.
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
            raise ValueError(f"signal {self.signal!r} is none of {', '.join(MEANINGS)}; give its meaning")

    @property
    def caption(self) -> str:
        return self.meaning or MEANINGS[self.signal]


def shared_scale(rows: Sequence[HeatmapRow]) -> float:
    """The value at which colour saturates, in the unit of the values; the same on both sides of zero and for all rows.

    It is the 99.5th percentile of |value| over all rows, to two significant digits: one wrong token is visible in a
    short answer, and a few outliers do not make the rest of a long answer pale. At least 0.01, so that identical
    checkpoints look alike.
    """
    sizes = np.abs(np.array([value for row in rows for value in row.values], dtype=np.float64))
    if not sizes.any():
        return 1.0
    # If nearly all values are 0, the percentile is 0 too, and on a scale of 0 the few other values would all saturate.
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
    """The numbers printed next to a row."""
    return summarise(np.array(row.values, dtype=np.float32))


def lowest(row: HeatmapRow) -> int | None:
    """The first index of the row's lowest value; None if the row has no tokens."""
    return int(np.argmin(row.values)) if row.values else None


def signed(number: float, digits: int = 2) -> str:
    """The number with its sign. Without a sign if it rounds to zero; in scientific notation from 100,000 on."""
    text = f"{number:+.3g}" if abs(number) >= 1e5 else f"{number:+.{digits}f}"
    return text if float(text) else text.lstrip("+-")


def typeset(number: float, digits: int = 2) -> str:
    """Like `signed`, with a typographic minus sign."""
    return signed(number, digits).replace("-", "−")


def plain(number: float) -> str:
    """Three digits after the point and no plus sign, for numbers other than the shown signal."""
    return typeset(number, 3).removeprefix("+")


def tick_labels(scale: float) -> tuple[str, ...]:
    """Five labels of the colour bar, evenly spaced, lowest first."""
    return tuple(f"{share * scale:+.3g}".replace("-", "−") if share else "0" for share in (-1, -0.5, 0, 0.5, 1))
