"""Directions against a target: cosines, the estimate of signal and noise, and which reference to use."""

import pytest
import torch
from dense_reward_trainer.credit.alignment import Alignment, alignment, alignment_lines, alignment_verdict
from torch.nn.functional import cosine_similarity


def test_noise_around_a_direction_hides_it_from_one_batch_and_not_from_the_estimate() -> None:
    generator = torch.Generator().manual_seed(0)
    target, across = torch.zeros(4000), torch.zeros(4000)
    target[0] = across[1] = 1.0
    expected = 0.6 * target + 0.8 * across
    noise = torch.randn(40, 4000, generator=generator) * 3 / 4000**0.5
    found = alignment((expected + one for one in noise), target)
    assert found.cosine == pytest.approx(0.6 / 10**0.5, abs=0.02)
    assert found.agreement == pytest.approx(0.1, abs=0.02)
    assert found.expected_cosine == pytest.approx(0.6, abs=0.06)
    directions = expected + noise
    cosines = cosine_similarity(directions, target[None], dim=1)
    assert found.cosine == pytest.approx(float(cosines.mean()), abs=1e-5)
    assert found.cosine_standard_error == pytest.approx(float(cosines.std()) / 40**0.5, rel=1e-4)
    pairs = cosine_similarity(directions[:, None], directions[None], dim=2)
    assert found.agreement == pytest.approx(float((pairs.sum() - 40) / (40 * 39)), abs=1e-5)
    assert found.cosines == pytest.approx(cosines.tolist(), abs=1e-5)
    assert f"{found.expected_cosine:.2f} ± 0.01" in [*alignment_lines({"early": found})][-1]


def test_the_error_of_the_estimate_is_its_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    target, expected = torch.zeros(500), torch.zeros(500)
    target[0], expected[0], expected[1] = 1.0, 0.6, 0.8
    found = [alignment(expected + torch.randn(20, 500, generator=generator) * 3 / 500**0.5, target) for _ in range(100)]
    estimates = torch.tensor([one.expected_cosine for one in found])
    errors = torch.tensor([one.expected_cosine_standard_error for one in found])
    assert float(estimates.mean()) == pytest.approx(0.6, abs=0.02)
    assert float(errors.mean()) == pytest.approx(float(estimates.std()), rel=0.3)


@pytest.mark.parametrize("dimension", [30, 1000])
def test_of_noise_next_to_nothing_is_claimed(dimension: int) -> None:
    generator = torch.Generator().manual_seed(0)
    found = [alignment(torch.randn(12, dimension, generator=generator), torch.ones(dimension)) for _ in range(200)]
    claimed = [one for one in found if one.expected_cosine is not None]
    assert 0 < len(claimed) < 20
    spread = float(torch.tensor([one.agreement for one in found]).std())
    errors = torch.tensor([one.agreement_standard_error for one in found])
    assert float(errors.mean()) == pytest.approx(spread, rel=0.2)
    hidden = next(one for one in found if one.expected_cosine is None)
    assert "unknown, the noise hides it: raise batches" in [*alignment_lines({"early": hidden})][-1]
    with pytest.raises(ValueError, match="at least 3"):
        alignment([torch.ones(2)] * 2, torch.ones(2))


def of_cosines(*cosines: float) -> Alignment:
    """An alignment of which only the cosines count."""
    return Alignment(sum(cosines) / len(cosines), 0.0, 0.5, 0.1, None, None, cosines)


def test_the_reference_whose_gradient_points_to_the_held_out_answers_is_used() -> None:
    found = {
        "base": of_cosines(0.20, 0.22, 0.18, 0.21),
        "early": of_cosines(0.40, 0.42, 0.38, 0.41),
        "reference": of_cosines(0.05, -0.04, 0.03, -0.05),
    }
    words = [*alignment_verdict(found)]
    assert words[0].startswith("use the reference early: its cosine is 0.403")
    assert words[1:] == ["this takes the held-out answers as good; dense-reward-train credit judges answers"]
    assert [line.split()[0] for line in [*alignment_lines(found)][3:]] == ["base", "early", "reference"]


def test_references_that_are_as_good_batch_by_batch_are_named() -> None:
    found = {"base": of_cosines(0.3, 0.1, 0.3, 0.2, 0.25), "early": of_cosines(0.31, 0.11, 0.29, 0.21, 0.25)}
    assert [*alignment_verdict(found)][1].startswith("not surely worse than early: base")
    found["base"] = of_cosines(*(cosine - 0.01 for cosine in found["early"].cosines[:-1]), 0.2401)
    assert not [*alignment_verdict(found)][1].startswith("not surely worse")


def test_where_all_is_noise_no_reference_helps_and_one_that_points_away_is_named() -> None:
    words = [*alignment_verdict({"early": of_cosines(0.1, -0.1, 0.12, -0.09), "base": of_cosines(-0.2, -0.21, -0.19)})]
    assert words[0].startswith("no reference helps here")
    assert words[1] == "points away from the held-out answers, do not train on it: base (-0.200)"


def test_the_more_references_are_tried_the_more_a_cosine_must_show() -> None:
    barely = of_cosines(0.06, 0.2, 0.04, 0.2, 0.06)
    assert next(alignment_verdict({"early": barely})).startswith("use the reference early")
    three = {"early": barely, "base": of_cosines(0.1, -0.1, 0.0), "reference": of_cosines(0.1, -0.1, 0.0)}
    assert next(alignment_verdict(three)).startswith("no reference helps here")
