"""A panel without data says why. Pictures are written as SVG, in which texts stay texts."""

from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import pytest
from dense_reward.bulk.stats.collected import Collected
from dense_reward.bulk.stats.picture import draw
from dense_reward_trainer.credit.auroc import Interval
from dense_reward_trainer.credit.error_localisation import Localisation
from dense_reward_trainer.credit.plot import plot_credit
from dense_reward_trainer.preview.plot import plot_preview
from dense_reward_trainer.preview.verdict import Verdict
from dense_reward_trainer.rl.plot import plot_run
from dense_reward_trainer.runs.run_folder import MetricsLog, plot_metrics


@pytest.fixture(autouse=True)
def texts() -> Iterator[None]:
    with mpl.rc_context({"svg.fonttype": "none"}):
        yield


def words(path: Path) -> str:
    return " ".join(path.read_text("utf-8").split())


def test_a_run_that_logged_nothing_says_so(tmp_path: Path) -> None:
    metrics = MetricsLog(tmp_path / "metrics.jsonl")
    plot_metrics(metrics, ("loss",), tmp_path / "loss.svg", ylabel="loss")
    assert "no step logged loss" in words(tmp_path / "loss.svg")


def test_a_dpr_run_without_known_answers_says_what_is_missing(tmp_path: Path) -> None:
    plot_run([{"step": 1, "reward_sum": 1.0, "kl_to_sft": 0.1, "length_mean": 3.0}], tmp_path / "dpr.svg")
    assert words(tmp_path / "dpr.svg").count("no held-out prompt has a known") == 1


def test_credit_without_samples_says_which_key_gives_them(tmp_path: Path) -> None:
    one = Localisation(Interval(0.9, 0.8, 1.0), Interval(0.5, 0.4, 0.6))
    plot_credit({"digit": {"reward, early": one}}, None, None, None, tmp_path / "a.svg")
    assert words(tmp_path / "a.svg").count("no answers were sampled: set policy") == 2
    plot_credit({}, None, None, None, tmp_path / "b.svg", not_ranked="all samples are right")
    assert words(tmp_path / "b.svg").count("all samples are right") == 2
    assert words(tmp_path / "b.svg").count("no errors were planted") == 2


def test_a_preview_without_answers_of_both_kinds_says_so(tmp_path: Path) -> None:
    plot_preview([], None, Verdict("unknown", None, None, None, "too few", {}), tmp_path / "preview")
    found = words(tmp_path / "preview.svg")
    assert "nothing to rank: right and wrong" in found
    assert "not known: too few prompts" in found


def test_statistics_of_nothing_say_so(tmp_path: Path) -> None:
    draw(Collected(1, 1), tmp_path / "stats.svg")
    assert words(tmp_path / "stats.svg").count("no scored token") == 3
