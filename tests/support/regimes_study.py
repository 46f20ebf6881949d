"""A small regimes study for tests, and figures of its cells."""

from collections.abc import Mapping

from dense_reward_trainer.studies.regimes.config import SweepConfig
from dense_reward_trainer.studies.regimes.figures import CellFigures, Figures

MIXED = {"task": {"name": "mixed_demonstrators"}}
POLICIES: dict[str, dict[str, object]] = {
    "dpr": {"kind": "dpr", "reference": "base", "grid": {"learning_rate": [1e-4, 2e-4, 4e-4]}},
    "continued": {"kind": "sft", "matched_flops": "dpr", "grid": {"learning_rate": [1e-4, 1e-3]}},
    "cold": {"kind": "sampled", "grid": {"temperature": [1.0, 0.7, 0.4]}},
    "tilted": {"kind": "sampled", "options": {"tilt": {"reference": "base", "strength": 1.0}}},
    "best": {
        "kind": "sampled",
        "options": {"choose": {"samples": 8, "by": "reward", "aggregate": "sum", "pair": "base"}},
    },
    "majority": {"kind": "sampled", "options": {"choose": {"samples": 8, "by": "majority"}}},
    "dpr_log": {"kind": "dpr", "reference": "base", "dpr": {"signal": "sft_logprob"}},
    "as_far": {"kind": "matched_kl", "to": "dpr", "values": [1.0, 0.7, 0.4]},
}
MILESTONES: dict[str, object] = {"milestones": {"base": 0.0, "reference": 0.5}}
SERIES: dict[str, object] = {"of": "dpr_log", "key": "kl_coefficient", "values": [0.5, 1.0], "label": "b"}


def study(**changes: object) -> SweepConfig:
    values = {
        "output_dir": "unused",
        "regimes": {"mixed": MIXED},
        "seeds": (1, 2),
        "sft": MILESTONES,
        "policies": POLICIES,
        "tuning": {"seeds": [1000]},
        "primary": "dpr",
    }
    return SweepConfig.model_validate(values | changes)


def figures(sampled: float, greedy: float | None = 1.0, kl: float | None = 0.0) -> Figures:
    return Figures(sampled, greedy, 40.0, kl)


def cell_of(policies: Mapping[str, Figures], right: float | None = 0.4, start: float = 0.1) -> CellFigures:
    return CellFigures(dict(policies), right, figures(start))
