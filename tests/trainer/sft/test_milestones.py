"""Samples processed after each step, and the steps of milestones, compared with counting one by one."""

import pytest
from dense_reward_trainer.sft.milestones import MilestoneSchedule
from hypothesis import given
from hypothesis import strategies as st


def counted(samples: int, batch: int, accumulation: int, processes: int, steps: int) -> list[int]:
    """Samples after 0, 1, ... steps, by walking through the epochs batch by batch and process by process."""
    totals = [0]
    while len(totals) <= steps:
        waiting = samples
        while waiting and len(totals) <= steps:
            taken = 0
            for _ in range(accumulation):
                for _ in range(processes):
                    size = min(batch, waiting)
                    waiting -= size
                    taken += size
            totals.append(totals[-1] + taken)
    return totals


SIZES = st.integers(1, 7)


@given(st.integers(1, 60), SIZES, SIZES, st.integers(1, 3), st.integers(1, 40))
def test_samples_processed_is_what_counting_gives(
    samples: int, batch: int, accumulation: int, processes: int, steps: int
) -> None:
    schedule = MilestoneSchedule(samples, batch * accumulation * processes, steps)
    assert [schedule.samples_processed(step) for step in range(steps + 1)] == counted(
        samples, batch, accumulation, processes, steps
    )


@given(st.integers(1, 60), SIZES, st.integers(1, 40), st.integers(0, 99))
def test_a_milestone_is_the_first_step_at_or_past_its_fraction(
    samples: int, per_step: int, steps: int, percent: int
) -> None:
    schedule = MilestoneSchedule(samples, per_step, steps)
    totals = counted(samples, per_step, 1, 1, steps)
    wanted = next(step for step in range(steps + 1) if 100 * totals[step] >= percent * totals[-1])
    assert schedule.step_at(percent / 100) == wanted


def test_half_of_several_epochs_lies_in_the_middle_of_them_and_not_of_the_first() -> None:
    schedule = MilestoneSchedule(samples=64, samples_per_step=5, total_steps=3 * 13)
    assert schedule.samples_total == 192
    assert schedule.step_at(0.5) == 20
    assert [schedule.samples_processed(step) for step in (12, 13, 14, 19, 20)] == [60, 64, 69, 94, 99]
    assert (schedule.unique_samples(12), schedule.unique_samples(20)) == (60, 64)


@pytest.mark.parametrize(
    ("fraction", "step"), [(0.0, 0), (1e-9, 1), (0.1, 1), (0.3, 3), (0.7, 7), (0.29, 3), (0.31, 4)]
)
def test_a_fraction_is_the_decimal_number_that_was_written(fraction: float, step: int) -> None:
    """0.1 * 30 is more than 3 in binary floating point."""
    assert MilestoneSchedule(samples=30, samples_per_step=3, total_steps=10).step_at(fraction) == step
