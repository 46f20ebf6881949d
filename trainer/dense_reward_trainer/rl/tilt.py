"""A policy tilted away from a reference, token by token: two models, no training. Must not know rewards or jobs.

The tilted policy is pi(a|s) proportional to pi_sft(a|s) (pi_sft(a|s) / pi_ref(a|s))^strength. DPR with immediate credit
and KL coefficient b moves towards it, with strength 1/b.

B rows of a batch; P prompt tokens, L tokens so far; N positions; V ids.
"""

import inspect
from dataclasses import dataclass
from math import inf

from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, eq=False)
class Tilt:
    """The model that a policy is tilted away from, and how strongly. Both models have the same ids."""

    reference: PreTrainedModel
    strength: float

    def __call__(self, sft_NV: Tensor, reference_NV: Tensor) -> Tensor:
        """log pi of the tilted policy, [N, V], from the logits of both models; normalised over all output rows.

        An id that the SFT model never gives stays at -inf, also if the reference never gives it: some models mask
        output rows without a token.
        """
        sft_NV, reference_NV = sft_NV.log_softmax(-1), reference_NV.to(sft_NV.dtype).log_softmax(-1)
        tilted_NV = (1 + self.strength) * sft_NV - self.strength * reference_NV
        return tilted_NV.masked_fill(sft_NV == -inf, -inf).log_softmax(-1)


class TiltedSampling:
    """A logits processor of `generate`: tilts the scores, before temperature and truncation.

    For one batch, because it keeps the reference's key-value cache. `mask_BP`: the attention mask of the prompts, which
    are padded on the left.
    """

    def __init__(self, tilt: Tilt, mask_BP: Tensor) -> None:
        self.tilt, self.mask_BP = tilt, mask_BP
        takes = inspect.signature(tilt.reference.forward).parameters
        self.takes_positions = "position_ids" in takes
        # transformers renamed it within version 5; a model that has neither reads all ids again for each token
        self.cache_name = next((name for name in ("cache", "past_key_values") if name in takes), None)
        self.cache: object = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores of the tilted policy, [B, V], up to a constant of each row. Ids with score -inf keep it."""
        return self.tilt(scores, self._reference_logits(input_ids))

    def _reference_logits(self, ids_BL: Tensor) -> Tensor:
        mask_BL = pad(self.mask_BP, (0, ids_BL.shape[1] - self.mask_BP.shape[1]), value=1)
        # without explicit positions, padding on the left would shift those of a model with absolute positions
        position_BL = (mask_BL.cumsum(-1) - 1).clamp(min=0)
        start = 0 if self.cache is None else ids_BL.shape[1] - 1
        options: dict[str, object] = {"use_cache": self.cache_name is not None}
        if self.takes_positions:
            options["position_ids"] = position_BL[:, start:]
        if self.cache_name is not None:
            options[self.cache_name] = self.cache
        output = self.tilt.reference(input_ids=ids_BL[:, start:], attention_mask=mask_BL, logits_to_keep=1, **options)
        self.cache = getattr(output, self.cache_name or "", None)
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV
