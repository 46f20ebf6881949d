"""FLOPs of jobs, and the steps of SFT that cost as many as a run of DPR."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from dense_reward_trainer.configs.base import load_config
from dense_reward_trainer.configs.dpr import DprConfig
from dense_reward_trainer.errors import JobError
from dense_reward_trainer.runs.run_folder import CONFIG_NAME, METRICS_NAME, MetricsLog
from dense_reward_trainer.studies.regimes.cell import Cell

# FLOPs per weight and token (Kaplan et al., arXiv 2001.08361, section 2.1); attention is left out on both sides.
FORWARD, TRAINING = 2, 6
SAMPLING = SCORING_OF_EACH_MODEL = LOGPROBS = FORWARD


def matched_steps(cell: Cell, dpr: str) -> int:
    """The steps of SFT that cost as many FLOPs as a DPR policy of the cell."""
    sft_lines = MetricsLog(cell.folder / "sft" / METRICS_NAME).read()
    dpr_lines = MetricsLog(cell.folder / dpr / METRICS_NAME).read()
    matched = load_config(DprConfig, cell.folder / dpr / CONFIG_NAME)
    dpr_tokens = sum(line.get("computed_tokens") or 0.0 for line in dpr_lines)
    if matched.engine == "trl":
        dpr_tokens = tokens_per_step(dpr_lines) * matched.steps * matched.updates_per_batch
    return matched_sft_steps(dpr_tokens, matched.updates_per_batch, tokens_per_step(sft_lines))


def dpr_flops_per_token(updates_per_batch: int) -> int:
    """FLOPs per weight and token: sample it, compute its log-prob, score it with two models, train on it."""
    return SAMPLING + LOGPROBS + 2 * SCORING_OF_EACH_MODEL + TRAINING * updates_per_batch


def matched_sft_steps(dpr_tokens: float, updates_per_batch: int, sft_tokens_per_step: float) -> int:
    """Steps of SFT with the FLOPs of a DPR run over `dpr_tokens`, prompts included; at least 1."""
    return max(1, round(dpr_tokens * dpr_flops_per_token(updates_per_batch) / (TRAINING * sft_tokens_per_step)))


def tokens_per_step(lines: Sequence[Mapping[str, float | None]]) -> float:
    """The mean number of tokens in a step of a run of TRL, from the lines of its metrics.

    TRL counts tokens from 0 again after a run is resumed, so intervals over which the count falls are left out.
    Raises JobError if no line has a count.
    """
    known = [((line.get("step") or 0.0), line["num_tokens"] or 0.0) for line in lines if "num_tokens" in line]
    steps = tokens = 0.0
    for (step, count), (next_step, next_count) in pairwise([(0.0, 0.0), *known]):
        if next_count >= count:
            steps += next_step - step
            tokens += next_count - count
    if not steps:
        raise JobError("the run logged no token counts, so no FLOPs can be matched to it: lower sft.log_every_steps")
    return tokens / steps
