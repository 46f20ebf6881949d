"""One decoder-only transformers model on one device: ids -> inputs of its output layer at chosen positions.

Sequences of a batch are padded on the right, where a causal model never looks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from dense_reward.engine.base import IdArray
from dense_reward.engine.logprobs import Head
from dense_reward.engine.weights import load_weights, weight_folders
from dense_reward.errors import CheckpointError
from dense_reward.manifest import Manifest

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True, slots=True)
class PostProcessing:
    """What a model does to its output layer's result: divide by `divisor`, multiply by `factor`, then soft-cap."""

    factor: float = 1.0
    divisor: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.divisor != 1.0:
            logits = logits / self.divisor
        if self.factor != 1.0:
            logits = logits * self.factor
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


class TorchModel:
    """A frozen causal language model. `head` turns what `rows` gives into logits as the model itself does.

    Where the output layer cannot be taken apart that way, `rows` are its own logits and `head` passes them on.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model.eval().requires_grad_(False)
        self._output: nn.Module | None = model.get_output_embeddings()
        self._post = _post_processing(model)
        self._captured: Tensor | None = None
        self._native = not self._head_is_exact()

    @property
    def device(self) -> torch.device:
        device: torch.device = self._model.device
        return device

    @property
    def vocabulary(self) -> int:
        return int(self._model.config.get_text_config().vocab_size)

    @property
    def max_length_tokens(self) -> int:
        return int(getattr(self._model.config.get_text_config(), "max_position_embeddings", 1 << 20))

    @property
    def long_tokens(self) -> int | None:
        """Sequences longer than this must not share a batch with shorter ones: longrope turns all by the longest."""
        return _long_tokens(self._model.config.get_text_config())

    @property
    def head(self) -> Head:
        return _unchanged if self._native else self._head

    @torch.inference_mode()
    def rows(self, sequences: Sequence[IdArray], positions: Sequence[IdArray]) -> Tensor:
        """Inputs of the output layer, [N, X], where N counts all `positions`, indices into their sequence, in order."""
        ids_BL = _padded(sequences).to(self.device)
        row_N = torch.from_numpy(np.repeat(np.arange(len(positions)), [len(p) for p in positions])).to(self.device)
        column_N = torch.from_numpy(np.concatenate(positions)).long().to(self.device)
        states_BLX = self._logits(ids_BL) if self._native else self._states(ids_BL)
        return states_BLX[row_N, column_N]

    @torch.inference_mode()
    def logprobs(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[float]:
        """Log-probs of a response by the plainest path there is: one sequence, no padding, the model's own logits.

        What probes are made of; the engine is proven against it.
        """
        ids_1L = torch.tensor([[*prompt_ids, *response_ids]], device=self.device)
        logits_TV = self._logits(ids_1L)[0, len(prompt_ids) - 1 : -1].float()
        targets_T1 = ids_1L[0, len(prompt_ids) :, None]
        return [float(x) for x in torch.log_softmax(logits_TV, -1).gather(1, targets_T1)[:, 0]]

    def _logits(self, ids_BL: Tensor) -> Tensor:
        """The mask hides nothing: padding comes after all that counts, where a causal model does not look.

        A mask that hid it would leave padding beyond a sliding window without anything to attend to: NaN in some
        implementations, which spreads to every token of its row.
        """
        logits: Tensor = self._model(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL), use_cache=False).logits
        return logits

    def _states(self, ids_BL: Tensor) -> Tensor:
        """The output layer's input at every position, [B, L, D]; the layer itself runs on two rows only."""
        self._capture_logits(ids_BL)
        states, self._captured = self._captured, None
        if states is None:
            raise RuntimeError("the model did not call its output layer")
        return states

    def _capture_logits(self, ids_BL: Tensor) -> Tensor:
        if self._output is None:
            raise RuntimeError("the model names no output layer")
        hook = self._output.register_forward_pre_hook(self._capture)
        try:
            return self._logits(ids_BL)
        finally:
            hook.remove()

    def _capture(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self._captured = args[0]
        return (args[0][:1, :2], *args[1:])

    def _head(self, rows_CD: Tensor) -> Tensor:
        if self._output is None:
            raise RuntimeError("the model names no output layer")
        logits: Tensor = self._post(self._output(rows_CD))
        return logits

    @torch.inference_mode()
    def _head_is_exact(self) -> bool:
        """Whether the output layer, applied from outside, gives the model's own logits on two rows.

        Bound to rounding: a soft cap that is far above these logits would move them by less than a per cent.
        """
        if self._output is None:
            return False
        ids_BL = torch.arange(6, device=self.device).reshape(2, 3) % self.vocabulary
        native_1CV = self._capture_logits(ids_BL)
        captured, self._captured = self._captured, None
        if captured is None or native_1CV.shape[:2] != (1, 2):
            return False
        ours_CV = self._head(captured[0, :2])
        if ours_CV.shape != native_1CV[0].shape:
            return False
        tolerance = 4 * torch.finfo(ours_CV.dtype).eps * native_1CV.abs().max()
        return bool(((ours_CV - native_1CV[0]).abs() <= tolerance).all())


def load_model(folder: Path, manifest: Manifest, *, dtype: str | None, device: str) -> TorchModel:
    """A checkpoint's model in `dtype` (the checkpoint's own where None). safetensors only, no remote code.

    Raises CheckpointError where it cannot be loaded or its vocabulary is not the manifest's.
    """
    chosen = DTYPES.get(dtype or manifest.dtype)
    if chosen is None:
        raise CheckpointError(
            f"{folder}: dtype {dtype or manifest.dtype!r} cannot be served: choose one of {sorted(DTYPES)}"
        )
    model = TorchModel(load_weights(*weight_folders(folder, manifest), chosen).to(device))
    if model.vocabulary != manifest.vocabulary:
        raise CheckpointError(
            f"{folder}: the model has {model.vocabulary} output rows, its manifest says {manifest.vocabulary}"
        )
    return model


def _long_tokens(config: PreTrainedConfig) -> int | None:
    """The length beyond which longrope takes its other factors; None for models without it."""
    parameters = getattr(config, "rope_parameters", None) or {}
    layers = [parameters, *(entry for entry in parameters.values() if isinstance(entry, dict))]
    lengths = [int(p["original_max_position_embeddings"]) for p in layers if p.get("rope_type") == "longrope"]
    return min(lengths, default=None)


def _post_processing(model: PreTrainedModel) -> PostProcessing:
    """From the configuration: Cohere and Falcon-H1 multiply, Granite divides, Gemma caps."""
    config = model.config.get_text_config()
    factor = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None)
    return PostProcessing(
        factor=1.0 if factor is None else float(factor),
        divisor=float(getattr(config, "logits_scaling", None) or 1.0),
        cap=getattr(config, "final_logit_softcapping", None),
    )


def _padded(sequences: Sequence[IdArray]) -> Tensor:
    """Ids, [B, L], padded on the right."""
    ids_BL = torch.zeros((len(sequences), max(len(ids) for ids in sequences)), dtype=torch.long)
    for row, ids in enumerate(sequences):
        ids_BL[row, : len(ids)] = torch.from_numpy(ids)
    return ids_BL


def _unchanged(rows: Tensor) -> Tensor:
    return rows
