"""A model's output layer, separated from it: its inputs in a forward, and from them the logits of a vocabulary tile.

What a model does to the result of its output layer (Cohere and Falcon-H1 multiply, Granite divides, Gemma caps) is read
from its configuration and verified against the model's own logits. If nothing matches, the rows are those logits.

Shapes: B sequences of L tokens, D hidden size, V vocabulary size, C rows, W token ids of a vocabulary tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel

from dense_reward.engines.kernels.packed_weights import PackedTiles, is_faster, packed_tiles
from dense_reward.engines.torch.logprobs import CPU_TILING

SHORT = (torch.bfloat16, torch.float16)
EXACT_NUMBERS = 1 << 22
"""Exact logits are computed from so many weights at once."""


@dataclass(frozen=True, slots=True)
class PostProcessing:
    """What a model does to the result of its output layer: divide by `divisor`, multiply by `factor`, then soft-cap."""

    factor: float = 1.0
    divisor: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.divisor != 1.0:
            logits = logits / self.divisor
        if self.factor != 1.0:
            logits = logits * self.factor
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


@dataclass(frozen=True, slots=True)
class LinearHead:
    """An output layer that is one matrix, so that a tile of the vocabulary costs only its share."""

    weight_VD: Tensor
    bias_V: Tensor | None
    post: PostProcessing
    tiled: bool = True
    packed: PackedTiles | None = None

    @property
    def vocab_size(self) -> int:
        return len(self.weight_VD)

    def logits(self, rows_CD: Tensor, tile: slice) -> Tensor:
        """[C, W], in the dtype of the weights; on a GPU in float32, in which its matmul accumulates anyway."""
        rows_CD, weight_WD = rows_CD.to(self.weight_VD.dtype), self.weight_VD[tile]
        bias_W = None if self.bias_V is None else self.bias_V[tile]
        if rows_CD.is_cuda and rows_CD.dtype in SHORT:
            logits_CW = torch.mm(rows_CD, weight_WD.T, out_dtype=torch.float32)
            return self.post(logits_CW if bias_W is None else logits_CW + bias_W)
        packed_CW = None if self.packed is None else self.packed.logits(rows_CD, tile, bias_W)
        if packed_CW is not None:
            return self.post(packed_CW)
        return self.post(functional.linear(rows_CD, weight_WD, bias_W))

    def exact_logits(self, rows_JD: Tensor, id_J: Tensor) -> Tensor | None:
        """Float32 [J]. A GPU's matmul gives all logits in float32; a CPU's rounds them to the dtype of the weights."""
        if self.weight_VD.device.type != "cpu" or self.weight_VD.dtype not in SHORT:
            return None
        step = max(1, EXACT_NUMBERS // self.weight_VD.shape[1])
        rows_JD, parts = rows_JD.to(self.weight_VD.dtype), range(0, max(1, len(id_J)), step)
        products = (rows_JD[at : at + step].float() * self.weight_VD[id_J[at : at + step]].float() for at in parts)
        logits_J = torch.cat([product.sum(dim=1) for product in products])
        return self.post(logits_J if self.bias_V is None else logits_J + self.bias_V[id_J].float())

    @property
    def is_faster_packed(self) -> bool:
        """Whether a packed copy of its weight, tile by tile, would be faster on this CPU."""
        return is_faster(self.weight_VD[: CPU_TILING.vocab])

    def pack(self) -> "LinearHead":
        """The same head with that copy."""
        return replace(self, packed=packed_tiles(self.weight_VD, CPU_TILING.vocab))

    def at(self, device: torch.device, dtype: torch.dtype | None = None) -> "LinearHead":
        """The same head on a device, in a dtype (None: its own)."""
        bias = None if self.bias_V is None else self.bias_V.to(device, dtype)
        return LinearHead(self.weight_VD.to(device, dtype), bias, self.post)


@dataclass(frozen=True, slots=True)
class OwnLogits:
    """For models whose output layer cannot be separated from them: the rows already are the model's logits."""

    vocab_size: int
    tiled: bool = True

    def logits(self, rows_CV: Tensor, tile: slice) -> Tensor:
        """[C, W]. A copy, because the caller overwrites it."""
        return rows_CV[:, tile].clone()

    def exact_logits(self, _: Tensor, __: Tensor) -> None:
        """Not known: the model rounded them."""


class CapturedHead:
    """Runs a model's forward and captures the input of its output layer, which computes only two rows of it.

    Two, because the logits of all rows would be the largest tensor of a batch, and `linear_head` needs some to compare.
    """

    def __init__(self, output: nn.Module | None) -> None:
        self._output = output
        self._captured: Tensor | None = None

    def inputs(self, model: PreTrainedModel, **forward: object) -> tuple[Tensor, Tensor]:
        """The output layer's input at every position, [B, L, D], and the model's logits of the first two, [1, 2, V].

        Raises RuntimeError if the model has no output layer or does not call it.
        """
        if self._output is None:
            raise RuntimeError("the model has no output layer: get_output_embeddings() returns None")
        hook = self._output.register_forward_pre_hook(self._capture)
        try:
            logits: Tensor = model(**forward, use_cache=False).logits
        finally:
            hook.remove()
        captured, self._captured = self._captured, None  # this object lives as long as the model: keep no batch alive
        if captured is None:
            raise RuntimeError("the model did not call its output layer")
        return captured, logits

    def _capture(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self._captured = args[0]
        # Without the strides of [B, L, D], which would send the matmul to a kernel that copies the whole matrix.
        return (args[0][0, :2][None], *args[1:])


def linear_head(model: PreTrainedModel, captured: CapturedHead) -> LinearHead | None:
    """The output layer with the post-processing that gives the model's own logits; None if no candidate does.

    Compared at rounding tolerance: a missed soft cap far above these logits would change them by less than 1 %, so a
    looser test would not notice.
    """
    output = model.get_output_embeddings()
    if not isinstance(output, nn.Linear):
        return None
    ids_BL = torch.arange(6, device=model.device).reshape(2, 3) % len(output.weight)
    try:
        states_BLD, native_1CV = captured.inputs(model, input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL))
    except RuntimeError:
        return None
    rows_CD, native_CV = states_BLD[0, :2], native_1CV[0]
    for post in _candidates(model.config.get_text_config()):
        head = LinearHead(output.weight, output.bias, post)
        ours_CV = head.logits(rows_CD, slice(None))
        if ours_CV.shape != native_CV.shape:
            return None
        tolerance = 4 * torch.finfo(native_CV.dtype).eps * native_CV.abs().max()
        if ((ours_CV - native_CV).abs() <= tolerance).all():
            return head
    return None


def _candidates(config: PreTrainedConfig) -> Iterator[PostProcessing]:
    """Post-processings to try. Names are ambiguous: Granite divides by logits_scaling, HyperCLOVA X multiplies."""
    scaling = float(getattr(config, "logits_scaling", None) or 1.0)
    factor = float(getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    yield PostProcessing(factor, scaling, cap)
    yield PostProcessing(factor * scaling, cap=cap)
    yield PostProcessing()
