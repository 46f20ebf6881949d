"""Where the time of an answer went: a header for the caller, stages for its trace, and metrics."""

from collections.abc import Mapping

from fastapi import Request, Response

from dense_reward.scoring.scorer import Scorer


def timed(
    request: Request, scorer: Scorer, response: Response, timing_s: Mapping[str, float], write_s: float
) -> Response:
    """The response with Server-Timing. `timing_s`: seconds of each stage, such as `queue_s`, which metrics have."""
    scorer.metrics.stage("write", write_s)
    stages_s = {name.removesuffix("_s"): seconds for name, seconds in timing_s.items()} | {"write": write_s}
    request.state.stages_s = stages_s
    response.headers["Server-Timing"] = ", ".join(f"{name};dur={1000 * s:.2f}" for name, s in stages_s.items())
    return response
