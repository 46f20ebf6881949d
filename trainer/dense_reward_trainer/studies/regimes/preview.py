"""Were the verdicts of the job preview right? Each is compared with what training on its reference then did.

Must not know jobs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from dense_reward_trainer.studies.regimes.figures import CellFigures
from dense_reward_trainer.studies.regimes.policies import AnyPolicy, DprPolicy, free_controls

MARGIN = 0.02
"""Differences of sampled accuracy up to this are none: a standard error of a share of 0.5 among 600 samples."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the job preview said of one reference: gain, control, no or unknown; and why."""

    verdict: str
    reason: str


@dataclass(frozen=True, slots=True)
class PreviewCheck:
    """The verdict on one reference, and the sampled accuracy that a policy trained on it then gained.

    `over_control`: over the best of the SFT model's greedy answer and its sampling options, which cost nothing.
    `outcome`: what the verdict should have been, in its terms.
    """

    regime: str
    seed: int
    reference: str
    verdict: Verdict
    policy: str
    over_sft: float
    over_control: float
    outcome: str

    @property
    def right(self) -> bool:
        return self.verdict.verdict == self.outcome


def check_previews(
    regime: str, seed: int, cell: CellFigures, policies: Mapping[str, AnyPolicy], verdicts: Mapping[str, Verdict]
) -> list[PreviewCheck]:
    """One check for each policy that was trained on the reward of a reference with a verdict."""
    sft, control = cell.policies["sft"].sampled_accuracy, free_control(cell, policies)
    checks = []
    for name, policy in policies.items():
        if isinstance(policy, DprPolicy) and policy.uses_reward and policy.reference in verdicts:
            reached = cell.policies[name].sampled_accuracy
            gains = reached - sft, reached - control
            outcome = "no" if gains[0] <= MARGIN else "gain" if gains[1] > MARGIN else "control"
            verdict = verdicts[policy.reference]
            checks.append(PreviewCheck(regime, seed, policy.reference, verdict, name, *gains, outcome))
    return checks


def free_control(cell: CellFigures, policies: Mapping[str, AnyPolicy]) -> float:
    """The best accuracy that the SFT model reaches with one answer to each prompt, greedy or sampled."""
    sft = cell.policies["sft"]
    sampled = [cell.policies[name].sampled_accuracy for name in free_controls(policies)]
    return max([sft.sampled_accuracy, sft.greedy_accuracy or 0.0, *sampled])
