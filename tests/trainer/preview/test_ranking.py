"""Rankings by every signal and aggregate: their values, and that chance is corrected for the number of scores."""

import numpy as np
import pytest
from dense_reward_trainer.preview.ranking import RESAMPLES, Scored, rank_all, scores_of
from dense_reward_trainer.rl.records import TokenArrays

RIGHT = [True, False] * 20
PROMPT = [i // 2 for i in range(40)]


def scored(values: list[float], reference: str | None = "base") -> Scored:
    return Scored(reference, "reward", "sum", tuple(values))


def test_scores_are_those_of_the_signals_and_aggregates() -> None:
    def row(*values: float) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        return np.array(values, dtype=np.float32)

    own, entropy = row(-1.0, -3.0), row(0.5, 0.25)
    arrays = TokenArrays(
        own, entropy, row(0.999, 0.249), row(-0.5, -0.1), row(2.0, -1.0), row(1.0, -2.0), row(1.0, 1.0)
    )
    alone = {(one.signal, one.aggregate): one.values[0] for one in scores_of(None, [arrays], 1)}
    assert alone["sft_logprob", "sum"] == -4.0
    assert alone["entropy_corrected", "min"] == -2.75
    assert alone["z_score", "min"] == pytest.approx(-2.75 / 0.5)
    assert alone["margin", "mean"] == pytest.approx((-0.5 - 2.9) / 2)
    paired = {(one.signal, one.aggregate): one.values[0] for one in scores_of("base", [arrays], 1)}
    assert paired["reward", "sum"] == 1.0
    assert paired["centred", "window_min"] == -2.0
    assert len(alone) == 16
    assert len(paired) == 8


def test_a_score_that_tells_right_from_wrong_separates_and_one_that_is_equal_does_not() -> None:
    good, none = rank_all([scored([1.0, 0.0] * 20), scored([1.0] * 40)], RIGHT, PROMPT, seed=0)
    assert (good.auroc.value, good.separates) == (1.0, True)
    # 20 prompts have right answers: if 14 % of all were ranked last, 20 prompts would show none in 5 of 100 cases
    assert good.auroc.low**20 == pytest.approx(0.05)
    assert (none.auroc.value, none.separates, none.p_holm) == (0.5, False, 1.0)


def test_holms_correction_counts_all_scores_of_references_and_no_other() -> None:
    good = scored([1.0, 0.0] * 20)
    alone = rank_all([good, scored([1.0] * 40, reference=None)], RIGHT, PROMPT, seed=0)
    assert alone[0].p_holm == pytest.approx(2 / (RESAMPLES + 1))
    assert alone[1].p_holm is None
    many = rank_all([good, *[scored([1.0] * 40)] * 9], RIGHT, PROMPT, seed=0)
    assert many[0].p_holm == pytest.approx(20 / (RESAMPLES + 1))


@pytest.mark.parametrize("right", [[True] * 40, [False] * 40])
def test_answers_of_one_kind_have_no_ranking(right: list[bool]) -> None:
    assert rank_all([scored([1.0] * 40)], right, PROMPT, seed=0) == []
