"""Was the verdict of the job preview right? It is compared with what training then did in the same cell.

Must not know jobs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from dense_reward_trainer.studies.regimes_config import AnyPolicy, DprPolicy, free_controls
from dense_reward_trainer.studies.regimes_figures import CellFigures, Verdict

MARGIN = 0.02
"""Differences of sampled accuracy up to this are none: a standard error of a share of 0.5 among 600 samples."""


@dataclass(frozen=True, slots=True)
class PreviewCheck:
    """One verdict, and the sampled accuracy that training on its reference then gained.

    `over_control`: over the best of the SFT model's greedy answer and its sampling options, which cost nothing.
    `on_its_reference`: whether `policy` was trained on the reference that the verdict names; else it is the primary.
    `outcome`: what the verdict should have been, in its terms.
    """

    regime: str
    seed: int
    verdict: Verdict
    policy: str
    over_sft: float
    over_control: float
    outcome: str
    on_its_reference: bool

    @property
    def right(self) -> bool:
        return self.verdict.verdict == self.outcome


def check_preview(
    regime: str, seed: int, cell: CellFigures, policies: Mapping[str, AnyPolicy], primary: str
) -> PreviewCheck | None:
    """None if the cell has no preview. Looks at the policy trained on the verdict's reference, else at the primary."""
    if cell.preview is None:
        return None
    trained = [
        name
        for name, policy in policies.items()
        if isinstance(policy, DprPolicy) and policy.uses_reward and policy.reference == cell.preview.reference
    ]
    policy = trained[0] if trained else primary
    reached = cell.policies[policy].sampled_accuracy
    over_sft = reached - cell.policies["sft"].sampled_accuracy
    over_control = reached - free_control(cell, policies)
    outcome = "no" if over_sft <= MARGIN else "gain" if over_control > MARGIN else "control"
    return PreviewCheck(regime, seed, cell.preview, policy, over_sft, over_control, outcome, bool(trained))


def free_control(cell: CellFigures, policies: Mapping[str, AnyPolicy]) -> float:
    """The best accuracy that the SFT model reaches with one answer to each prompt, greedy or sampled."""
    sft = cell.policies["sft"]
    sampled = [cell.policies[name].sampled_accuracy for name in free_controls(policies)]
    return max([sft.sampled_accuracy, sft.greedy_accuracy or 0.0, *sampled])
