"""Matched cost: the number of SFT steps with the same FLOPs as a DPR run.

A forward pass costs 2 FLOPs per weight and token, a training pass 6 (Kaplan et al., arXiv 2001.08361, section 2.1);
attention is left out on both sides.
"""

FORWARD, TRAINING = 2, 6
SAMPLING = SCORING_OF_EACH_MODEL = LOGPROBS = FORWARD


def dpr_flops_per_token(updates_per_batch: int) -> int:
    """FLOPs per weight and token: sample it, compute its log-prob, score it with two models, train on it."""
    return SAMPLING + LOGPROBS + 2 * SCORING_OF_EACH_MODEL + TRAINING * updates_per_batch


def matched_sft_steps(dpr_tokens: float, updates_per_batch: int, sft_tokens_per_step: float) -> int:
    """Steps of SFT with the FLOPs of a DPR run over `dpr_tokens`, prompts included; at least 1."""
    return max(1, round(dpr_tokens * dpr_flops_per_token(updates_per_batch) / (TRAINING * sft_tokens_per_step)))
