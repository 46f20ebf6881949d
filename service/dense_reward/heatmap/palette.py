"""Diverging colour scales for signed token signals, and the ink that is legible on each colour.

Each palette has a variant for light and one for dark surroundings. Knows nothing of tokens or pictures.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

STEPS = 32  # colour steps on either side of zero
DEFAULT_PALETTE = "blue-red"


@dataclass(frozen=True, slots=True)
class Colour:
    """An sRGB colour, channels 0 to 255."""

    red: int
    green: int
    blue: int

    @property
    def hex(self) -> str:
        return f"#{self.red:02x}{self.green:02x}{self.blue:02x}"

    @property
    def luminance(self) -> float:
        """Relative luminance, 0 (black) to 1 (white): WCAG 2.1."""
        linear = [_linear(channel / 255) for channel in (self.red, self.green, self.blue)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@dataclass(frozen=True, slots=True)
class Swatch:
    """A background colour and the colour of the text on it."""

    fill: Colour
    ink: Colour


@dataclass(frozen=True, slots=True)
class Palette:
    """Colour stops from the lowest value to the highest, evenly spaced. Their number is odd: the middle one is zero."""

    name: str
    light: tuple[Colour, ...]
    dark: tuple[Colour, ...]


BLACK = Colour(0, 0, 0)
WHITE = Colour(255, 255, 255)


def contrast(one: Colour, other: Colour) -> float:
    """Contrast ratio of two colours, 1 to 21: WCAG 2.1."""
    darker, lighter = sorted((one.luminance, other.luminance))
    return (lighter + 0.05) / (darker + 0.05)


def palette_named(name: str) -> Palette:
    """The palette of that name. Raises ValueError if there is none."""
    if name not in PALETTES:
        raise ValueError(f"no palette is called {name!r}: choose one of {', '.join(PALETTES)}")
    return PALETTES[name]


def level(value: float, scale: float) -> int:
    """The colour step of a value: 0 at -scale and below, STEPS at zero, 2 * STEPS at +scale and above."""
    return STEPS + round(max(-1.0, min(1.0, value / scale)) * STEPS)


@cache
def swatches(palette: Palette, *, dark: bool) -> tuple[Swatch, ...]:
    """The 2 * STEPS + 1 colours of a palette, lowest first; `level` is the index."""
    stops = palette.dark if dark else palette.light
    fills = (_between(stops, step / (2 * STEPS)) for step in range(2 * STEPS + 1))
    return tuple(Swatch(fill, _ink(fill)) for fill in fills)


def _linear(channel: float) -> float:
    return float(channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4)


def _ink(fill: Colour) -> Colour:
    # Either black or white has a contrast of at least 4.58 to any colour. No grey guarantees that.
    return max(BLACK, WHITE, key=lambda ink: contrast(ink, fill))


def _between(stops: tuple[Colour, ...], share: float) -> Colour:
    position = share * (len(stops) - 1)
    lower = min(int(position), len(stops) - 2)
    weight = position - lower
    one, other = stops[lower], stops[lower + 1]
    pairs = ((one.red, other.red), (one.green, other.green), (one.blue, other.blue))
    red, green, blue = (round(start + (end - start) * weight) for start, end in pairs)
    return Colour(red, green, blue)


def _stops(hexes: str) -> tuple[Colour, ...]:
    return tuple(Colour(*bytes.fromhex(code)) for code in hexes.split())


_GREY = _stops("1c1c1c 848484 cccccc e6e6e6 ffffff")

_BLUE_RED_DARK = "ff7a66 d9503f a13a30 5e2e2c 2b2f36 24405e 2a639c 3a8ad6 6cb6ff"

# The light blue-red and purple-green are ColorBrewer's RdBu and PRGn, which colour-blind readers can distinguish.
# dark-red is RdBu the other way round, whole: dark red is high, as in Figure 1 of the paper.
# Grey has the same colours in light and dark surroundings (dark is low), so that print and screen agree.
PALETTES: Mapping[str, Palette] = MappingProxyType(
    {
        palette.name: palette
        for palette in (
            Palette(
                DEFAULT_PALETTE,
                light=_stops("b2182b d6604d f4a582 fddbc7 f7f7f7 d1e5f0 92c5de 4393c3 2166ac"),
                dark=_stops(_BLUE_RED_DARK),
            ),
            Palette(
                "dark-red",
                light=_stops("053061 2166ac 4393c3 92c5de d1e5f0 f7f7f7 fddbc7 f4a582 d6604d b2182b 67001f"),
                dark=_stops(_BLUE_RED_DARK)[::-1],
            ),
            Palette(
                "purple-green",
                light=_stops("762a83 9970ab c2a5cf e7d4e8 f7f7f7 d9f0d3 a6dba0 5aae61 1b7837"),
                dark=_stops("d99be6 b070c2 824d94 4c3558 2b2f36 26462f 2f7040 429f58 6fd685"),
            ),
            Palette("grey", light=_GREY, dark=_GREY),
        )
    }
)
