"""Colour scales: legible, symmetric, one colour per value."""

from itertools import pairwise

import pytest
from dense_reward.heatmap import palette_variables
from dense_reward.heatmap.palette import BLACK, PALETTES, STEPS, WHITE, contrast, level, palette_named, swatches
from hypothesis import given
from hypothesis import strategies as st

numbers = st.floats(allow_nan=False, allow_infinity=False)
scales = st.floats(min_value=1e-3, max_value=1e6)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", PALETTES)
def test_text_on_every_colour_is_legible(name: str, dark: bool) -> None:
    colours = swatches(PALETTES[name], dark=dark)
    assert len(colours) == 2 * STEPS + 1
    assert min(contrast(one.fill, one.ink) for one in colours) >= 4.5


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", PALETTES)
def test_ends_and_middle_are_the_stops_and_neighbouring_steps_differ(name: str, dark: bool) -> None:
    palette = PALETTES[name]
    stops = palette.dark if dark else palette.light
    fills = [one.fill for one in swatches(palette, dark=dark)]
    assert (fills[0], fills[STEPS], fills[-1]) == (stops[0], stops[len(stops) // 2], stops[-1])
    assert all(one != other for one, other in pairwise(fills))


def test_the_default_paints_low_red_and_high_blue() -> None:
    for dark in (False, True):
        low, *_, high = (one.fill for one in swatches(PALETTES["blue-red"], dark=dark))
        assert low.red > low.blue
        assert high.blue > high.red


def test_the_papers_palette_paints_high_dark_red() -> None:
    *_, high = (one.fill for one in swatches(PALETTES["dark-red"], dark=False))
    assert high.red > 2 * high.blue
    assert high.luminance < 0.1


def test_the_page_gets_every_colour_of_every_palette_for_light_and_dark() -> None:
    styles = palette_variables()
    for name, palette in PALETTES.items():
        (rule,) = [line for line in styles.splitlines() if line.startswith(f'[data-palette="{name}"]')]
        for step, (light, dark) in enumerate(
            zip(swatches(palette, dark=False), swatches(palette, dark=True), strict=True)
        ):
            wanted = light.fill.hex if light.fill == dark.fill else f"light-dark({light.fill.hex},{dark.fill.hex})"
            assert f"--c{step}:{wanted};" in rule
    assert styles.count("background:var(--c") == 2 * STEPS + 1


@given(numbers, scales)
def test_the_scale_is_symmetric_around_zero(value: float, scale: float) -> None:
    assert level(value, scale) + level(-value, scale) == 2 * STEPS
    assert 0 <= level(value, scale) <= 2 * STEPS


@given(numbers, numbers, scales)
def test_a_higher_value_never_has_a_lower_colour(one: float, other: float, scale: float) -> None:
    low, high = sorted((one, other))
    assert level(low, scale) <= level(high, scale)


def test_colour_saturates_at_the_scale() -> None:
    assert [level(value, 2.0) for value in (-9.0, -2.0, 0.0, 2.0, 9.0)] == [0, 0, STEPS, 2 * STEPS, 2 * STEPS]


def test_contrast_is_that_of_the_web_guidelines() -> None:
    assert contrast(BLACK, WHITE) == pytest.approx(21)
    assert contrast(WHITE, WHITE) == pytest.approx(1)


def test_an_unknown_palette_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'jet'.*blue-red, dark-red, purple-green, grey"):
        palette_named("jet")
