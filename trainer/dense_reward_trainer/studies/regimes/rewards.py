"""How good the rewards are that a cell of the regimes study leaves: of its SFT run, of self-play, and of RFT.

All are measured by the job credit on the same problems, with the same planted errors and samples.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from dense_reward_trainer.credit.references import pair_of
from dense_reward_trainer.studies.regimes.cell import Cell, Job, seeded_job
from dense_reward_trainer.studies.regimes.figures import RewardFigures
from dense_reward_trainer.studies.regimes.policies import Overrides, RftPolicy, SelfPlayPolicy

SFT = "sft"
_Measured = Mapping[str, Mapping[str, float]]


class _CreditJson(TypedDict):
    """Fields of a credit job's result that are read. `ranking` is null if all samples were right, or all wrong."""

    localisation: Mapping[str, Mapping[str, _Measured]]
    ranking: Mapping[str, Mapping[str, _Measured]] | None


def sources(cell: Cell) -> tuple[str, ...]:
    """The runs that leave a reward: of SFT, self-play and RFT; none if the study has no credit."""
    if cell.config.credit is None or cell.is_tuning:
        return ()
    return SFT, *(name for name, policy in cell.policies.items() if isinstance(policy, SelfPlayPolicy | RftPolicy))


def credit_job(cell: Cell, source: str, url: str) -> Job:
    """The job credit on the pairs of one run, served at `url`."""
    overrides: Overrides = {
        "data": {"source": str(cell.files.test)},
        "policy": str(cell.checkpoint(SFT)),
        "service_url": url,
    }
    return seeded_job(
        cell,
        f"credit--{source}",
        "credit",
        "arithmetic_credit",
        overrides | (cell.config.credit or {}) | cell.settings.credit,
    )


def credit_file(cell: Cell, source: str) -> Path:
    """The result of the job credit; it exists once the job is finished."""
    return cell.folder / credit_job(cell, source, "http://not.asked").name / "credit.json"


def reward_figures(cell: Cell, source: str) -> RewardFigures:
    """AUROCs by column. Of runs other than SFT, only the columns of their reference: others are of another model."""
    result: _CreditJson = json.loads(credit_file(cell, source).read_text())["result"]
    located, ranked = result["localisation"], result["ranking"] or {}
    found = {}
    for column in next(iter(located.values())):
        if source == SFT or pair_of(column) is not None:
            by_kind = {kind: one[column]["auroc"]["value"] for kind, one in located.items()}
            by_aggregate = {name: one["auroc"]["value"] for name, one in ranked.get(column, {}).items()}
            found[column] = by_kind | by_aggregate
    return found
