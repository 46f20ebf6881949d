"""The verdict by made-up figures: every rule, the order of the rules, and the choice among references."""

from collections.abc import Mapping

import pytest
from dense_reward_trainer.credit.auroc import Interval
from dense_reward_trainer.credit.paired import Comparison
from dense_reward_trainer.preview.gains import SFT, Gain, Gains
from dense_reward_trainer.preview.ranking import Ranked
from dense_reward_trainer.preview.verdict import Counts, Kind, Verdict, verdict

ENOUGH = Counts(50, right=80, wrong=120, prompts_with_right=40, prompts_with_wrong=45)
ABOVE, CHANCE, BELOW, WIDE = (0.94, 0.90, 0.97), (0.52, 0.43, 0.61), (0.28, 0.20, 0.36), (0.60, 0.42, 0.78)
Found = tuple[float, float, float]


def ranked(name: str, auroc: Found) -> list[Ranked]:
    """The minimum of the reward ranks as given, its sum a bit worse, and the SFT model alone better than both."""
    p = 0.001 if auroc[1] > 0.5 or auroc[2] < 0.5 else 0.8
    worse = Interval(*(x - 0.02 for x in auroc))
    return [
        Ranked(name, "reward", "min", Interval(*auroc), p),
        Ranked(name, "reward", "sum", worse, p),
        Ranked(None, "sft_logprob", "sum", Interval(0.99, 0.98, 1.0), None),
    ]


def around(value: float, half: float = 0.04) -> Comparison:
    p = 0.001 if abs(value) > half else 0.5
    return Comparison(Interval(value, value - half, value + half), p, p)


def gains(
    tilted: Mapping[str, float], *, sft: float = 0.34, greedy: float = 0.1, top_p: float = 0.36, half: float = 0.04,
    prompts: int = 50, effective: float | None = None,
) -> Gains:  # fmt: skip
    """Shares of right answers, every difference with an interval of this half-width."""
    shares = {SFT: sft, "greedy": greedy, "top-p 0.95": top_p}
    free = {name: around(share, half).interval for name, share in shares.items()}
    over_sft = {name: around(share - sft, half) for name, share in shares.items() if name != SFT}
    found = {}
    for name, share in tilted.items():
        over = {other: around(share - value, half) for other, value in shares.items()}
        p = max(one.p_holm for one in over.values())
        found[name] = Gain(around(share, half).interval, over, p, effective)
    return Gains("sampled" if effective is None else "reweighted", prompts, free, over_sft, found)


def of_base(auroc: Found, found: Gains | None, counts: Counts = ENOUGH) -> Verdict:
    return verdict(ranked("base", auroc), found, counts, ["base"])


def test_the_reason_holds_the_figures_that_decide() -> None:
    found = of_base(ABOVE, gains({"base": 0.71}))
    assert (found.verdict, found.reference, found.signal, found.aggregate) == ("gain", "base", "reward", "min")
    assert found.reason == (
        "base reference, reward by min: 0.94 [0.90, 0.97]; tilted 0.71 against 0.34 (SFT) and 0.36 (best control, "
        "top-p 0.95): expect a gain"
    )


@pytest.mark.parametrize(
    ("auroc", "found", "kind", "words"),
    [
        pytest.param(ABOVE, gains({"base": 0.71}), "gain", "expect a gain", id="rule 4: ahead of all"),
        pytest.param(ABOVE, gains({"base": 0.20}), "no", "worse than SFT", id="rule 2: tilted is worse"),
        pytest.param(BELOW, gains({"base": 0.33}), "no", "wrong answers above right", id="rule 3: below chance"),
        pytest.param(
            BELOW,
            gains({"base": 0.71}),
            "no",
            "wrong answers above right",
            id="rule 3: below chance, though the tilted policy gains",
        ),
        pytest.param(ABOVE, gains({"base": 0.71}, greedy=0.9), "control", "greedy is free", id="rule 5: greedy ahead"),
        pytest.param(ABOVE, gains({"base": 0.71}, top_p=0.705), "control", "top-p 0.95 is", id="rule 5: as good"),
        pytest.param(
            ABOVE, gains({"base": 0.41}, greedy=0.6, half=0.1), "control", "greedy", id="rule 5: control surely gains"
        ),
        pytest.param(ABOVE, gains({"base": 0.345}, half=0.02, top_p=0.35), "no", "hardly better", id="rule 6: surely"),
        pytest.param(ABOVE, gains({"base": 0.37}, greedy=0.9), "no", "greedy is free and better", id="rule 6: control"),
        pytest.param(CHANCE, gains({"base": 0.36}, top_p=0.34), "no", "does not separate", id="rule 7: nothing"),
        pytest.param(CHANCE, None, "no", "does not separate", id="rule 7: gain not known"),
        pytest.param(ABOVE, None, "unknown", "the gain is not known", id="rule 8: gain not known"),
        pytest.param(WIDE, gains({"base": 0.40}, half=0.2, top_p=0.30), "unknown", "too wide", id="rule 8: wide"),
        pytest.param(ABOVE, gains({"base": 0.50}, half=0.2), "unknown", "too wide", id="rule 8: gain not sure"),
        pytest.param(CHANCE, gains({"base": 0.71}), "unknown", "too wide", id="rule 8: gains, but does not rank"),
        pytest.param(WIDE, None, "unknown", "the gain is not known", id="rule 8: nothing is sure"),
    ],
)
def test_the_first_rule_that_holds_decides(auroc: Found, found: Gains | None, kind: Kind, words: str) -> None:
    one = of_base(auroc, found)
    assert one.verdict == kind
    assert words in one.reason.rpartition("top-p 0.95): ")[2]


@pytest.mark.parametrize(
    "counts",
    [
        Counts(9, 80, 120, 9, 9),
        Counts(29, 14, 15, 14, 15),
        Counts(50, 16, 184, 4, 50),
        Counts(50, 184, 16, 50, 4),
        Counts(50, 0, 200, 0, 50),
    ],
    ids=["prompts", "answers", "right answers to 4 prompts", "wrong answers to 4 prompts", "none right"],
)
def test_too_few_answers_give_no_verdict_but_the_cure(counts: Counts) -> None:
    one = of_base(ABOVE, gains({"base": 0.71}), counts)
    assert one.verdict == "unknown"
    assert f"({counts.prompts_with_right} prompts have a right one, " in one.reason
    assert "label more answers (raise prompts" in one.reason


def test_five_prompts_with_each_kind_of_answer_are_enough() -> None:
    assert of_base(ABOVE, gains({"base": 0.71}), Counts(10, 15, 15, 5, 5)).verdict == "gain"


@pytest.mark.parametrize(("prompts", "effective"), [(9, 2.5), (15, 1.4)])
def test_a_reweighted_gain_from_few_prompts_or_few_effective_answers_is_not_known(
    prompts: int, effective: float
) -> None:
    sure = of_base(ABOVE, gains({"base": 0.71}, prompts=15, effective=2.5))
    assert sure.verdict == "gain"
    assert "answers reweighted (2.5 effective of each prompt) 0.71 against" in sure.reason
    one = of_base(ABOVE, gains({"base": 0.71}, prompts=prompts, effective=effective))
    assert one.verdict == "unknown"


def test_one_ranking_that_holds_only_without_holms_correction_is_no_gain() -> None:
    lucky = [Ranked("base", "reward", "min", Interval(0.6, 0.51, 0.69), 0.2)]
    assert verdict(lucky, gains({"base": 0.71}), ENOUGH, ["base"]).verdict == "unknown"


@pytest.mark.parametrize(
    ("shares", "aurocs", "kind", "reference"),
    [
        ({"early": 0.55, "base": 0.71}, {"early": ABOVE, "base": ABOVE}, "gain", "base"),
        ({"early": 0.20, "base": 0.71}, {"early": BELOW, "base": ABOVE}, "gain", "base"),
        ({"early": 0.20, "base": 0.37}, {"early": BELOW, "base": ABOVE}, "unknown", "base"),
        ({"early": 0.20, "base": 0.15}, {"early": BELOW, "base": BELOW}, "no", "early"),
    ],
)
def test_over_all_references_the_one_that_gains_most_decides(
    shares: dict[str, float], aurocs: dict[str, Found], kind: Kind, reference: str
) -> None:
    ranking = [one for name, auroc in aurocs.items() for one in ranked(name, auroc)]
    one = verdict(ranking, gains(shares, half=0.06), ENOUGH, list(shares))
    assert (one.verdict, one.reference) == (kind, reference)
    assert list(one.references) == list(shares)
