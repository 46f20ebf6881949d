"""The exact task: its values against an enumeration of every response, and the study that runs on it."""

import copy
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_reward.engines.torch.model import TorchModel
from dense_reward.engines.torch.pair import QUANTITIES, ComputeOptions, PairEngine
from dense_reward.records import Branch, EngineInfo, Trunk, Wants
from dense_reward.reward import candidate_reward, reward
from dense_reward.schemas import SignalName
from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.rl.sampling import Sampling, sample
from dense_reward_trainer.studies.options import compare as compare_options
from dense_reward_trainer.studies.options.config import Curve, EstimatorsConfig, TaskOptions
from dense_reward_trainer.studies.options.exact_task import END, TableRewards, Task, Tree, make_task
from dense_reward_trainer.studies.options.table import outcome, tokens_to
from pydantic import ValidationError
from torch import Tensor

pytestmark = pytest.mark.slow

OPTIONS = TaskOptions(symbols=3, horizon=3, prompts=2, demonstrations=300)
COEFFICIENT = 0.5


@pytest.fixture(scope="module")
def task() -> Task:
    return make_task(OPTIONS, 0)


def every_response(tree: Tree) -> list[tuple[int, ...]]:
    ids = range(1, tree.vocab_size)
    ended = [(*body, END) for length in range(tree.horizon) for body in product(ids, repeat=length)]
    return [*ended, *product(ids, repeat=tree.horizon)]


def sums(task: Task, table_PSV: Tensor) -> Tensor:
    """The sum of a value over each response, [P, Y]."""
    return torch.stack(
        [
            table_PSV[:, [task.tree.index(y[:t]) for t in range(len(y))], list(y)].sum(1)
            for y in every_response(task.tree)
        ],
        dim=1,
    )


def test_the_probabilities_of_all_responses_add_up_to_1(task: Task) -> None:
    torch.testing.assert_close(sums(task, task.sft_PSV).exp().sum(1), torch.ones(2, dtype=torch.float64))


def test_states_are_numbered_level_by_level(task: Task) -> None:
    states = [state for length in range(task.tree.horizon) for state in task.tree.states(length)]
    assert [task.tree.index(state) for state in states] == list(range(task.sft_PSV.shape[1]))


def test_log_probs_of_states_are_those_of_the_model_after_the_very_tokens(task: Task) -> None:
    for p, prompt in enumerate(task.prompts):
        for state in [(), (2,), (3, 1)]:
            logits_V = task.sft.model(torch.tensor([[*prompt.tolist(), *state]])).logits[0, -1].detach()
            expected_V = torch.log_softmax(logits_V.double(), -1)
            torch.testing.assert_close(task.sft_PSV[p, task.tree.index(state)], expected_V, rtol=0, atol=1e-5)


def test_the_objective_is_the_expected_sum_of_rewards_less_the_kl(task: Task) -> None:
    policy_PSV = torch.log_softmax(torch.randn(task.sft_PSV.shape, dtype=torch.float64), -1)
    policy_PY, sft_PY, reward_PY = (sums(task, table) for table in (policy_PSV, task.sft_PSV, task.reward_PSV))
    expected = (policy_PY.exp() * (reward_PY - COEFFICIENT * (policy_PY - sft_PY))).sum(1).mean()
    assert task.objective(policy_PSV, COEFFICIENT) == pytest.approx(float(expected), abs=1e-12)


def test_the_optimum_is_that_of_the_tilted_distribution_over_responses_and_is_reached(task: Task) -> None:
    sft_PY, reward_PY = sums(task, task.sft_PSV), sums(task, task.reward_PSV)
    expected = COEFFICIENT * torch.logsumexp(sft_PY + reward_PY / COEFFICIENT, 1).mean()
    assert task.optimum(COEFFICIENT) == pytest.approx(float(expected), abs=1e-12)
    best_PSV = task.optimal_policy(COEFFICIENT)
    assert task.objective(best_PSV, COEFFICIENT) == pytest.approx(float(expected), abs=1e-12)
    elsewhere_PSV = torch.log_softmax(best_PSV + 0.1 * torch.randn(best_PSV.shape, dtype=torch.float64), -1)
    assert task.objective(elsewhere_PSV, COEFFICIENT) < float(expected)
    assert task.objective(task.sft_PSV, COEFFICIENT) < float(expected)


def test_the_reference_is_another_point_of_the_same_run(task: Task) -> None:
    again, other = make_task(OPTIONS, 0), make_task(OPTIONS, 1)
    assert torch.equal(again.sft_PSV, task.sft_PSV)
    assert not torch.allclose(other.sft_PSV, task.sft_PSV)
    assert 1e-3 < task.objective(task.sft_PSV, COEFFICIENT) < task.optimum(COEFFICIENT)
    whole = make_task(OPTIONS.model_copy(update={"reference": 0.999}), 0)
    assert whole.reward_PSV.abs().max() < task.reward_PSV.abs().max()


@pytest.mark.parametrize("signal", ["reward", "centred", "sft_logprob"])
def test_looked_up_rewards_are_those_of_the_engine_that_serves(task: Task, signal: SignalName) -> None:
    models = TorchModel(copy.deepcopy(task.sft.model)), TorchModel(copy.deepcopy(task.reference.model))
    info = EngineInfo("sft", "reference", "r", "float32", "cpu", task.tree.vocab_size, 16, QUANTITIES, related=True)
    engine = PairEngine(*models, info, ComputeOptions(1000))
    rollouts = sample(task.sft, task.prompts, Sampling(task.tree.horizon, 3), seed=0)
    candidates = [np.tile(np.array([3, 0], dtype=np.int32), (len(r.response_T), 1)) for r in rollouts]
    trunks = [
        Trunk(r.prompt_P, (Branch(r.response_T, np.ones(len(r.response_T), dtype=bool), ids_TK),))
        for r, ids_TK in zip(rollouts, candidates, strict=True)
    ]
    looked_up = TableRewards(task, signal).score(rollouts, candidates)
    for found, (computed,) in zip(looked_up, engine.score(trunks, Wants(kl=True)), strict=True):
        assert computed.kl_S is not None
        reward_T, reward_TK = reward(computed), candidate_reward(computed)
        assert reward_TK is not None
        expected_T, expected_TK = {
            "reward": (reward_T, reward_TK),
            "centred": (reward_T - computed.kl_S, reward_TK - computed.kl_S[:, None]),
            "sft_logprob": (computed.sft_logprob_S, computed.candidate_sft_logprob_SK),
        }[signal]
        for looked, wanted in (
            (found.signal_T, expected_T),
            (found.candidate_signal_TK, expected_TK),
            (found.kl_T, computed.kl_S),
            (found.candidate_sft_logprob_TK, computed.candidate_sft_logprob_SK),
        ):
            assert looked is not None
            assert wanted is not None
            np.testing.assert_allclose(looked, wanted, atol=1e-4)


def study(folder: Path, **changes: object) -> EstimatorsConfig:
    values = {
        "output_dir": folder,
        "task": OPTIONS,
        "estimators": {"plain": {"baseline": "none"}, "named": {"candidates": 4, "average_decay": 0.5}},
        "steps": 2,
        "prompts_per_step": 2,
        "group_size": 4,
        "learning_rates": (1e-3, 1e-2),
        "seeds": (0, 1),
        "evaluate_first": 0,
        "evaluate_every": 1,
    }
    return EstimatorsConfig.model_validate(values | changes)


def test_a_study_leaves_figures_curves_and_a_picture_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[str] = []
    with monkeypatch.context() as patched:  # a worker process costs seconds: the second run has one
        patched.setattr(compare_options, "in_processes", lambda _, function, items: map(function, items))
        outcomes = compare_options.run(study(tmp_path / "run"), reports.append)
    record = json.loads((tmp_path / "run" / "estimators.json").read_text())
    assert set(outcomes) == set(record["outcomes"]) == {"plain", "named"}
    assert "gap closed" in reports[0]
    assert (tmp_path / "run" / "estimators.png").stat().st_size > 10_000
    curves = sorted((tmp_path / "run" / "curves").rglob("*.json"))
    assert len(curves) == 2 * (2 + 2)

    taken = {path: path.read_bytes() for path in curves}
    curves[0].unlink()
    again = compare_options.run(study(tmp_path / "run", processes=2), reports.append)
    assert again == outcomes, "a curve does not depend on its process"
    for path in curves[1:]:
        assert path.read_bytes() == taken[path]


def test_other_options_under_an_old_name_are_refused_instead_of_taking_its_runs(tmp_path: Path) -> None:
    finished = a_curve(0.0, 0.5, estimator="plain", options={"baseline": "none"}, learning_rate=1e-3, seed=1000)
    path = finished.path_in(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text(finished.model_dump_json())
    changed = study(tmp_path, estimators={"plain": {"baseline": "batch"}, "more": {"candidates": 4}})
    with pytest.raises(ConfigError, match=r"a run of plain with other options .*another name"):
        compare_options.run(changed, print)
    path.write_text('{"estimator": "plain"}')
    with pytest.raises(ConfigError, match="not a run that this version has written"):
        compare_options.run(study(tmp_path), print)


def test_scored_tokens_count_candidates(tmp_path: Path) -> None:
    config = study(tmp_path)
    plain, named = (compare_options.learning_curve(config, name, 1e-3, 0) for name in ("plain", "named"))
    assert plain.steps == named.steps == (0, 1, 2)
    assert plain.gap_closed[0] == named.gap_closed[0] == 0.0
    assert named.scored_tokens[-1] > 4 * plain.scored_tokens[-1]


def test_more_steps_on_exact_credit_close_the_gap(tmp_path: Path) -> None:
    options = {"candidates": 4, "baseline": "leave_one_out", "updates_per_batch": 4}
    estimators = {"plain": {}, "reused": options}
    config = study(tmp_path, steps=12, group_size=16, estimators=estimators, evaluate_every=12)
    curve = compare_options.learning_curve(config, "reused", 1e-2, 0)
    assert curve.steps[0] == 0
    assert curve.gap_closed[0] == pytest.approx(0.0, abs=1e-6)
    assert 0.5 < curve.gap_closed[-1] <= 1.0


def a_curve(*gaps: float, **changes: object) -> Curve:
    values: dict[str, object] = {
        "estimator": "e",
        "options": {},
        "learning_rate": 1.0,
        "seed": 0,
        "steps": range(len(gaps)),
        "scored_tokens": [100 * i for i in range(len(gaps))],
        "gap_closed": gaps,
        "diverged": False,
        "sft_objective": 0.0,
        "optimal_objective": 1.0,
        "cpu_s": 0.0,
    }
    return Curve.model_validate(values | changes)


def finished_curves(config: EstimatorsConfig, gap: Callable[[str, float, int], float]) -> None:
    """All runs that a study could ask for, with the gap that a function of estimator, rate and seed closes."""
    rates = (*config.learning_rates, *config.wider_learning_rates)
    for name, rate, seed in product(config.estimators, rates, (*config.seeds, config.tuning_seed)):
        options = config.estimators[name]
        curve = a_curve(0.0, gap(name, rate, seed), estimator=name, options=options, learning_rate=rate, seed=seed)
        path = curve.path_in(config.output_dir)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(curve.model_dump_json())


def test_a_rate_on_the_edge_widens_the_grid_up_to_its_bound(tmp_path: Path) -> None:
    config = study(tmp_path, learning_rates=(1e-3, 1e-2), wider_learning_rates=(1e-5, 1e-4, 0.1, 1.0))
    best = {"plain": 1e-5, "named": 0.1}
    finished_curves(config, lambda name, rate, seed: -abs(np.log(rate / best[name])))
    outcomes = compare_options.run(config, print)
    assert outcomes["plain"].rates_tried == (1e-5, 1e-4, 1e-3, 1e-2)
    assert outcomes["plain"].learning_rate == 1e-5
    assert outcomes["plain"].rate_on_edge
    assert outcomes["named"].rates_tried == (1e-3, 1e-2, 0.1, 1.0)
    assert not outcomes["named"].rate_on_edge
    assert outcomes["named"].learning_rate == 0.1


def test_differences_are_within_a_seed_and_corrected_within_their_family(tmp_path: Path) -> None:
    names = ["plain", "sure", "other", "another"]
    config = study(
        tmp_path,
        estimators={name: {} for name in names},
        seeds=(3, 4, 5, 6),
        other_seeds=2,
        compared=("sure",),
    )
    above = {"plain": 0.0, "sure": 0.1, "other": 0.2, "another": -0.1}
    finished_curves(config, lambda name, rate, seed: 0.1 * seed + above[name] + 1e-4 * (seed % 2) * len(name))
    reports: list[str] = []
    outcomes = compare_options.run(config, reports.append)
    found = json.loads((tmp_path / "estimators.json").read_text())["differences"]
    assert outcomes["sure"].seeds == outcomes["plain"].seeds == (3, 4, 5, 6)
    assert outcomes["other"].seeds == (3, 4)
    assert set(found) == {"sure", "other", "another"}
    assert found["sure"]["interval"]["value"] == pytest.approx(0.1, abs=1e-3)
    assert found["sure"]["interval"]["low"] > 0.09, "the spread over seeds, 0.3, is in both"
    assert found["sure"]["p_holm"] == found["sure"]["p"] < 1e-6
    smaller = min(found[name]["p"] for name in ("other", "another"))
    assert min(found[name]["p_holm"] for name in ("other", "another")) == pytest.approx(2 * smaller)
    assert "minus control" in reports[0]


def test_a_rate_at_which_a_run_diverges_is_not_chosen(tmp_path: Path) -> None:
    config = study(tmp_path)
    broken = compare_options.learning_curve(config, "plain", 1e30, 0)
    assert broken.diverged
    assert len(broken.gap_closed) == len(broken.steps) < 3
    fine = a_curve(0.0, -5.0, learning_rate=1e-3)
    assert compare_options.best_rate([broken, fine]) == 1e-3
    assert compare_options.by_rate([broken])["1e+30"]["gap_closed"] is None
    with pytest.raises(JobError, match="plain diverges at every learning rate"):
        compare_options.best_rate([broken])
    with pytest.raises(JobError, match=r"diverges at its learning rate 1e\+30 with seed 0"):
        compare_options.refuse_diverged([fine, broken])


@pytest.mark.parametrize(
    ("gaps", "tokens"),
    [((0.0, 1.0), 50), ((0.0, 0.4, 0.6, 0.2), 150), ((0.0, 0.25, 0.75, 0.9), 150), ((0.0, 0.4), None)],
)
def test_tokens_to_half_of_the_gap_lie_on_a_line_between_evaluations(
    gaps: tuple[float, ...], tokens: float | None
) -> None:
    assert tokens_to(0.5, a_curve(*gaps)) == (None if tokens is None else pytest.approx(tokens))


def test_an_estimator_that_did_not_get_half_way_with_every_seed_has_no_median() -> None:
    reached = outcome([a_curve(0.0, 1.0), a_curve(0.0, 0.6)], [1.0])
    assert reached.median_tokens_to_half is not None
    assert outcome([a_curve(0.0, 1.0), a_curve(0.0, 0.4)], [1.0]).median_tokens_to_half is None


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"tuning_seed": 1}, "chosen on a reported task"),
        ({"seeds": (0, 1, 1)}, "list each seed once"),
        ({"seeds": (0,)}, "seeds"),
        ({"other_seeds": 3}, "there are only 2 seeds"),
        ({"learning_rates": (1e-2, 1e-3)}, "learning_rates must rise"),
        ({"wider_learning_rates": (1e-4, 5e-3)}, "0.005 is between the lowest and the highest"),
        ({"control": "paper"}, "'paper' is named in control or compared, but is none of the estimators"),
        ({"compared": ("plain",)}, "has no difference to itself"),
        ({"estimators": {"plain": {}, "a": {"steps": 3}}}, "steps is set for all estimators: remove it here"),
        ({"estimators": {"plain": {}, "a": {"gama": 3}}}, "estimators.a.gama"),
        ({"estimators": {"plain": {}, "a": {"kl_penalty": "loss_k1"}}}, "would do nothing"),
    ],
)
def test_a_study_that_means_nothing_is_refused(tmp_path: Path, changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        study(tmp_path, **changes)


def test_a_task_without_a_gap_is_refused(tmp_path: Path) -> None:
    same = OPTIONS.model_copy(update={"reference": 0.9999999})
    with pytest.raises(ConfigError, match="leaves a gap"):
        compare_options.learning_curve(study(tmp_path, task=same), "plain", 1e-3, 0)
