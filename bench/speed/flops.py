"""Floating-point operations that the scoring of a workload needs at least, with each shared prompt computed once. Pure.

A multiplication and an addition are two operations. Norms, rotations, activations and softmax are left out.
"""

from bench.speed.shapes import Shape
from bench.speed.workloads import Lengths

MODELS = 2  # sft and reference


def flops_of(shape: Shape, lengths: Lengths) -> int:
    """Of both models, over all prompts."""
    return MODELS * sum(_prompt_flops(shape, prompt, responses) for prompt, responses in lengths)


def _prompt_flops(shape: Shape, prompt: int, responses: tuple[int, ...]) -> int:
    """One model, one prompt. The last token of a response predicts nothing: neither it nor its row is counted.

    Each position behind the prompt predicts one token, and the prompt's last one the first token of every response.
    """
    behind = sum(tokens - 1 for tokens in responses)
    linear = 2 * shape.layers * shape.layer_weights * (prompt + behind)
    head = 2 * shape.hidden * shape.vocabulary * (1 + behind)
    attention = 4 * shape.layers * shape.heads * shape.head_dim * causal_pairs(prompt, responses)
    return linear + head + attention


def causal_pairs(prompt: int, responses: tuple[int, ...]) -> int:
    """Query and key pairs: each position with itself and all that come before it in its own sequence."""
    return triangle(prompt) + sum((tokens - 1) * prompt + triangle(tokens - 1) for tokens in responses)


def triangle(n: int) -> int:
    return n * (n + 1) // 2
