"""Sizes of the models that are measured: Qwen2's architecture, random weights. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Shape:
    """One size of a Qwen2 model, in the words of its configuration."""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int
    vocabulary: int
    tied: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def layer_weights(self) -> int:
        """Weights of the matmuls of one layer: query and output, key and value, and the three of the MLP."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.key_value_heads)
        return attention + 3 * self.hidden * self.intermediate


HALF_BILLION = Shape(896, 24, 14, 2, 4864, 151_936)
SHAPES: Mapping[str, Shape] = {
    "40m": Shape(512, 8, 8, 2, 1536, 32_000),
    "05b": HALF_BILLION,
    "05b_v32k": replace(HALF_BILLION, vocabulary=32_000),
    "05b_v128k": replace(HALF_BILLION, vocabulary=128_000),
    "05b_v256k": replace(HALF_BILLION, vocabulary=256_000),
    "15b": Shape(1536, 28, 12, 2, 8960, 151_936),
    "7b": Shape(3584, 28, 28, 4, 18_944, 152_064, tied=False),
}
