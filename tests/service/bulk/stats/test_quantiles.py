"""Quantiles of a stream are within 0.5 % of exact ones; token classes; lowest spans."""

import numpy as np
import pytest
from dense_reward.bulk.stats.quantiles import BINS, LARGEST, SMALLEST, GroupedValues, bins


@pytest.mark.parametrize("name", ["normal", "heavy", "negative", "few"])
def test_quantiles_are_within_half_a_percent(name: str) -> None:
    draw = np.random.default_rng(0)
    values = {
        "normal": draw.normal(size=20_000),
        "heavy": draw.standard_cauchy(20_000),
        "negative": -draw.exponential(3, 20_000),
        "few": np.array([-2.0, 5.0]),
    }[name]
    found = GroupedValues(2)
    for part in np.array_split(values, 7):
        found.add(part, np.ones(len(part), np.int64))
    assert found.of(0) is None
    distribution = found.of(1)
    assert distribution is not None
    exact = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95], method="inverted_cdf")
    streamed = [distribution.p5, distribution.p25, distribution.p50, distribution.p75, distribution.p95]
    assert streamed == pytest.approx(exact.tolist(), rel=0.00502, abs=SMALLEST)
    assert distribution.count == len(values)
    assert distribution.mean == pytest.approx(values.mean())
    assert distribution.std == pytest.approx(values.std())
    assert distribution.negative == pytest.approx((values < 0).mean())
    assert (distribution.min, distribution.max) == (values.min(), values.max())


def test_bins_are_in_the_order_of_the_values_and_hold_any_number() -> None:
    values = np.array([-1e30, -LARGEST, -1.0, -SMALLEST, 0.0, SMALLEST, 1.0, LARGEST, 1e30])
    found = bins(values)
    assert np.all(np.diff(found) >= 0)
    assert (found[0], found[4], found[-1]) == (0, BINS // 2, BINS - 1)
