"""The figures at the top of bench/results/evidence.json."""

from collections.abc import Mapping, Sequence
from typing import Any

MIXED = "mixed"
Record = Mapping[str, Any]


def keys(study: Record) -> dict[str, object]:
    """Of demonstrators of mixed quality, of the boundary, and of preview's verdicts."""
    return {
        **gain_keys(study["primary"].get(MIXED)),
        **boundary_keys(study["boundary"]),
        **preview_keys(study["preview"]),
    }


def gain_keys(primary: Record | None) -> dict[str, float | str]:
    """DPR with the base as reference minus the best control, on demonstrators of mixed quality; none if unfinished.

    `..._over_one_model`: minus the best of the controls that, unlike the reward, need the SFT model alone.
    """
    keys: dict[str, float | str] = {}
    if primary is None:
        return keys
    for metric, name in (("greedy_accuracy", "greedy"), ("sampled_accuracy", "sampled")):
        for kind, suffix in (("best_control", ""), ("best_of_one_model", "_over_one_model")):
            control = primary[kind][metric]
            found = primary["differences"][metric][control]["interval"]
            keys |= {
                f"regime_a_{name}_gain{suffix}": found["value"],
                f"regime_a_{name}_gain{suffix}_ci_low": found["low"],
                f"regime_a_{name}_control{suffix}": control,
            }
    return keys


def boundary_keys(places: Record) -> dict[str, float]:
    """The gain where the demonstrations are furthest below the model that SFT starts from, if there are two places."""
    if len(places) < 2:
        return {}
    worst = min(places.values(), key=lambda one: float(one["shift"]["value"]))
    return {"boundary_gain": worst["gain"]["value"], "boundary_gain_ci_high": worst["gain"]["high"]}


def preview_keys(previews: Sequence[Record]) -> dict[str, int]:
    """How many verdicts of the job preview agree with what training then did."""
    unknown = sum(one["verdict"]["verdict"] == "unknown" for one in previews)
    right = sum(one["right"] for one in previews)
    return {"preview_right": right, "preview_runs": len(previews), "preview_unknown": unknown}
