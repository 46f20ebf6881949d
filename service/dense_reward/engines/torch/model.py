"""One decoder-only transformers model on one device: ids -> inputs of its output layer at the rows that predict.

Uses the packed path if the model supports it (see packing_check.py); otherwise pads on the right, which a causal model
never attends to.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from dense_reward.batching.packing import Packed
from dense_reward.batching.prefix_trees import Index
from dense_reward.engines.kernels.fused_layers import fuse_layers
from dense_reward.engines.kernels.graphs import RowGraphs
from dense_reward.engines.kernels.packed_weights import is_faster, needs_memory, packed
from dense_reward.engines.kernels.varlen import Varlen, on_device, varlen_of
from dense_reward.engines.torch import attention
from dense_reward.engines.torch.feedforward import bound_feedforward
from dense_reward.engines.torch.heads import CapturedHead, LinearHead, OwnLogits, linear_head
from dense_reward.engines.torch.logprobs import CPU_TILING, Head
from dense_reward.engines.torch.memory import stored_bytes
from dense_reward.engines.torch.weights import MakeRoom, load_weights, no_room_needed, weight_folders
from dense_reward.errors import CheckpointError
from dense_reward.manifest import Manifest
from dense_reward.records import IdArray

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
COPIED_HEAD = "(output layer)"
"""Its name among the weights: no parameter has it."""


@dataclass(frozen=True, slots=True)
class DeviceRow:
    """A packed row on a device: N tokens, R of them predict. `plan` says which tokens attend to which."""

    ids_1N: Tensor
    positions_1N: Tensor
    rows_R: Tensor
    plan: attention.RowPlan


def device_row(packed: Packed, device: torch.device) -> DeviceRow:
    """Copy a row to a device; to a CUDA device with the index tensors for its variable-length kernels."""

    def copied(array: IdArray | Index) -> Tensor:
        return on_device(array.astype(np.int64), device)

    varlen = varlen_of(packed.trees, device) if device.type == "cuda" else None
    plan = attention.RowPlan(packed.trees, varlen)
    return DeviceRow(copied(packed.ids_N)[None], copied(packed.positions_N)[None], copied(packed.rows_R), plan)


class TorchModel:
    """A frozen causal language model. `head` computes the model's own logits from the rows that it returns.

    If the output layer cannot be separated from the model, the rows are the model's logits and `head` returns them.
    """

    def __init__(self, model: PreTrainedModel, *, fuse: bool = True) -> None:
        """`fuse`: layers for which the device has kernels are computed by them."""
        attention.register()
        self._model = model.eval().requires_grad_(False)
        self._own_attention: str = model.config._attn_implementation
        self.fused = fuse_layers(model) if fuse else ()
        bound_feedforward(model)  # before the first forward, which `linear_head` runs
        self._captured = CapturedHead(model.get_output_embeddings())
        with torch.inference_mode():
            self._linear = linear_head(model, self._captured)
        self._graphs: RowGraphs | None = None
        self.head: Head = self._linear or OwnLogits(self.vocab_size)

    @property
    def device(self) -> torch.device:
        device: torch.device = self._model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._model.dtype
        return dtype

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """All parameters by name, and the output layer, which can be a copy of one of them."""
        head = {COPIED_HEAD: self.head.weight_VD} if isinstance(self.head, LinearHead) else {}
        return {**dict(self._model.named_parameters()), **head}

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights; shared storage counts once."""
        return stored_bytes(self.weights.values())

    @property
    def vocab_size(self) -> int:
        return int(self._model.config.get_text_config().vocab_size)

    @property
    def max_length_tokens(self) -> int:
        """The longest sequence with exact positions: dynamic rope changes them above its original length."""
        return longest_sequence(self._model.config)

    @property
    def rope_length_limit(self) -> int | None:
        """Sequences longer than this must not share a batch with shorter ones: longrope rotates all by the longest."""
        return rope_length_limit(self._model.config)

    @property
    def transformers_model(self) -> PreTrainedModel:
        return self._model

    def use_head(self, *, device: torch.device, dtype: torch.dtype | None) -> None:
        """Compute logits on a device, in a dtype, with a copy of the output layer.

        Raises CheckpointError if the output layer cannot be separated from the model.
        """
        if self._linear is None:
            raise CheckpointError(
                "this model's output layer cannot be separated from it: serve both models on one device, without "
                "--head-dtype"
            )
        self.head = self._linear.at(device, dtype)

    def use_norms(self, dtype: torch.dtype) -> None:
        """Compute the norms in a dtype, and round their results once to the model's own."""
        norms_in(self._model, dtype)

    def pack_weights(self, *, at_most_bytes: float) -> str | None:
        """On a CPU, hold copies of the weights in the layout that its fastest matmuls read, where that is faster.

        Returns what was done, or that the copies would take too many bytes; None if nothing would be faster.
        """
        output = self._model.get_output_embeddings()
        linears = [linear for linear in map(_plain_linear, self._model.modules()) if linear not in (None, output)]
        faster = [linear for linear in linears if linear is not None and is_faster(linear.weight)]
        head = self.head if isinstance(self.head, LinearHead) and self.head.is_faster_packed else None
        new = [linear.weight for linear in faster if needs_memory(linear.weight)]
        if head is not None and needs_memory(head.weight_VD, CPU_TILING.vocab):
            new.append(head.weight_VD)
        if not (faster or head):
            return None
        more_mb = f"{stored_bytes(new) / 1e6:,.0f} MB"
        if stored_bytes(new) > at_most_bytes:
            return f"no copies for faster matmuls: they would take {more_mb}, and too little is free"
        for linear in faster:
            linear.forward = partial(packed(linear.weight), bias_O=linear.bias)  # type: ignore[method-assign]
        if head is not None:
            self.head = head.pack()
        layers = [*([f"{len(faster)} matrices"] if faster else []), *([] if head is None else ["the output layer"])]
        return f"copies of {' and '.join(layers)} in a layout for faster matmuls take {more_mb} more"

    @property
    def has_graphs(self) -> bool:
        """Whether its small rows are recorded already."""
        return self._graphs is not None

    @torch.inference_mode()
    def record_graphs(self) -> str:
        """Record CUDA graphs of small rows, each launched by one call. Returns what was recorded, or why not."""
        if self._linear is None:
            return "none, because its output layer cannot be separated from it"
        self._attend_by(attention.NAME)
        try:
            self._graphs = RowGraphs(self._recorded, self.device)
        except (RuntimeError, attention.PackedAttentionError) as error:
            return f"none, because {str(error).partition(chr(10))[0]}"
        return f"rows of up to {self._graphs.longest_row} tokens"

    def _recorded(self, ids_1N: Tensor, positions_1N: Tensor, varlen: Varlen) -> Tensor:
        """[N, D], as graphs record it: the choice of kernels does not depend on the row's trees."""
        return self._states(DeviceRow(ids_1N, positions_1N, ids_1N[0, :0], attention.RowPlan((), varlen)))

    def _states(self, row: DeviceRow) -> Tensor:
        """[N, D]: the inputs of the output layer at every token of a row."""
        forward = {"input_ids": row.ids_1N, "position_ids": row.positions_1N, "plan": row.plan}
        return self._captured.inputs(self._model, **forward)[0][0]

    @torch.inference_mode()
    def packed_rows(self, row: DeviceRow) -> Tensor:
        """[R, X]: the inputs of the output layer at the rows that predict. Raises PackedAttentionError."""
        self._attend_by(attention.NAME)
        if self._graphs is not None and self._linear is not None:
            states_ND = self._graphs.states(row.ids_1N, row.positions_1N, row.plan.varlen)
            if states_ND is not None:
                return states_ND[row.rows_R]
        # No attention mask: the plan replaces it. transformers passes `plan` through to packed_attention.
        forward = {"input_ids": row.ids_1N, "position_ids": row.positions_1N, "plan": row.plan}
        if self._linear is None:
            # the model's own logits at the rows that predict only: [R, V] and not [N, V]
            logits: Tensor = self._model(**forward, use_cache=False, logits_to_keep=row.rows_R).logits
            return logits[0]
        return self._states(row)[row.rows_R]

    @torch.inference_mode()
    def padded_rows(self, sequences: Sequence[IdArray], positions: Sequence[IdArray]) -> Tensor:
        """The same, [R, X], for `positions`, indices into their sequence, in order."""
        self._attend_by(self._own_attention)
        ids_BL = padded_ids(sequences).to(self.device)
        row_R = torch.from_numpy(np.repeat(np.arange(len(positions)), [len(p) for p in positions])).to(self.device)
        column_R = torch.from_numpy(np.concatenate(positions)).long().to(self.device)
        if self._linear is None:
            return self._logits(ids_BL)[row_R, column_R]
        return self._captured.inputs(self._model, **all_visible(ids_BL))[0][row_R, column_R]

    @torch.inference_mode()
    def logprobs(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[float]:
        """Log-probs of a response by the plainest path: one sequence, no padding, the model's own logits.

        Probes are computed by it, and the engine is verified against them.
        """
        self._attend_by(self._own_attention)
        ids_1L = torch.tensor([[*prompt_ids, *response_ids]], device=self.device)
        logits_TV = self._logits(ids_1L)[0, len(prompt_ids) - 1 : -1].float()
        targets_T1 = ids_1L[0, len(prompt_ids) :, None]
        return [float(x) for x in torch.log_softmax(logits_TV, -1).gather(1, targets_T1)[:, 0]]

    def _attend_by(self, name: str) -> None:
        if self._model.config._attn_implementation != name:
            self._model.set_attn_implementation(name)

    def _logits(self, ids_BL: Tensor) -> Tensor:
        logits: Tensor = self._model(**all_visible(ids_BL), use_cache=False).logits
        return logits


def _plain_linear(module: nn.Module) -> nn.Linear | None:
    """The module if it is nothing but a linear layer; a forward on the instance is ours or another library's."""
    return module if type(module) is nn.Linear and "forward" not in vars(module) else None


def load_model(
    folder: Path,
    manifest: Manifest,
    *,
    dtype: str | None,
    device: str,
    compile_for: Callable[[PreTrainedModel], bool] = lambda _: False,
    make_room: MakeRoom = no_room_needed,
) -> TorchModel:
    """A checkpoint's model in `dtype` (None: the checkpoint's own). safetensors only, no remote code.

    `compile_for` says whether a CPU computes the model with compiled kernels, and compiles them.

    Raises CheckpointError if it cannot be loaded or its vocabulary is not the manifest's.
    """
    chosen = DTYPES.get(dtype or manifest.dtype)
    if chosen is None:
        raise CheckpointError(
            f"{folder}: cannot be served in dtype {dtype or manifest.dtype!r}: choose one of {sorted(DTYPES)}"
        )
    weights = load_weights(*weight_folders(folder, manifest), chosen, device=device, make_room=make_room)
    model = TorchModel(weights, fuse=weights.device.type != "cpu" or compile_for(weights))
    if model.vocab_size != manifest.vocabulary:
        raise CheckpointError(
            f"{folder}: the model has {model.vocab_size} output rows, but its manifest states {manifest.vocabulary}: "
            "adopt the checkpoint again"
        )
    return model


def longest_sequence(config: PreTrainedConfig) -> int:
    """The longest sequence with exact positions, in tokens."""
    text = config.get_text_config()
    limits = [getattr(text, "max_position_embeddings", None) or 1 << 20, *_original_lengths(text, "dynamic")]
    return int(min(limits))


def rope_length_limit(config: PreTrainedConfig) -> int | None:
    """The length at which longrope changes how it rotates all tokens of a batch; None for other models."""
    return min(_original_lengths(config.get_text_config(), "longrope"), default=None)


def norms_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Compute a model's norms in a dtype, and round their results once to the model's own."""
    # A local, because a hook that refers to the model makes a cycle, and it is not freed with its last pair.
    served = model.dtype
    for module in model.modules():
        if type(module).__name__.endswith("Norm"):
            module.to(dtype)
            module.register_forward_pre_hook(lambda _, args: (args[0].to(dtype), *args[1:]))
            module.register_forward_hook(lambda _, __, out: out.to(served))


def _original_lengths(config: PreTrainedConfig, rope_type: str) -> list[int]:
    """The original training lengths in a configuration with this kind of rope; empty without it."""
    parameters = getattr(config, "rope_parameters", None) or {}
    layers = [parameters, *(entry for entry in parameters.values() if isinstance(entry, dict))]
    found = [p for p in layers if p.get("rope_type") == rope_type]
    lengths = [p.get("original_max_position_embeddings") or config.max_position_embeddings for p in found]
    return [int(length) for length in lengths]


def all_visible(ids_BL: Tensor) -> dict[str, Tensor]:
    """The ids with a mask of ones. It need not hide padding, which is on the right of every token that counts.

    A mask that hid padding would leave padding tokens beyond a sliding window with nothing to attend to: NaN in some
    implementations, which spreads to every token of the row.
    """
    return {"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL)}


def padded_ids(sequences: Sequence[IdArray]) -> Tensor:
    """Ids, [B, L], padded on the right with 0."""
    ids_BL = torch.zeros((len(sequences), max(len(ids) for ids in sequences)), dtype=torch.long)
    for row, ids in enumerate(sequences):
        ids_BL[row, : len(ids)] = torch.from_numpy(ids)
    return ids_BL
