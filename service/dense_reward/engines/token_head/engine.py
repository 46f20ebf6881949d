"""A token head: a decoder with one linear output, whose value after each token of a response is the token's reward.

The files are those of transformers' AutoModelForSequenceClassification with one label, as TRL's RewardTrainer saves
them: the score of a whole text there is the value after its last token here. Sequences are padded on the right, which a
causal model never attends to; a prompt is computed again for each of its responses.

Shapes: B sequences of L tokens, D hidden size, S scored tokens of all sequences.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from dense_reward.batching.prefix_trees import Index
from dense_reward.engines.torch.device import with_device_errors
from dense_reward.engines.torch.model import (
    DTYPES,
    all_visible,
    longest_sequence,
    norms_in,
    padded_ids,
    rope_length_limit,
)
from dense_reward.engines.torch.weights import MakeRoom, load_weights, no_room_needed, weight_folders
from dense_reward.errors import CheckpointError
from dense_reward.manifest import Manifest
from dense_reward.records import Cost, EngineInfo, IdArray, Scores, Trunk, Wants, Work, head_scores

CHECKED_TOKENS = 5
"""Tokens of the sequence on which the head is compared with the model's own forward."""


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence of a batch: its place among trunks and branches, its ids, and the positions of its scored tokens."""

    trunk: int
    branch: int
    ids_L: IdArray
    position_S: Index


class HeadModel:
    """A frozen token head. Its last layer is computed in float32, whatever the dtype of the others.

    Raises CheckpointError if the model's own score of a text is not that layer after the last token.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model.eval().requires_grad_(False)
        score = getattr(model, "score", None)
        if not isinstance(score, nn.Linear) or score.out_features != 1:
            raise CheckpointError(
                f"{type(model).__name__} has no layer `score` with one output: only such reward models are served"
            )
        self._weight_1D = score.weight.float()
        self._bias_1 = None if score.bias is None else score.bias.float()
        self._refuse_other_scores()

    @property
    def device(self) -> torch.device:
        device: torch.device = self._model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._model.dtype
        return dtype

    @property
    def transformers_model(self) -> PreTrainedModel:
        return self._model

    @property
    def vocab_size(self) -> int:
        return int(self._model.config.get_text_config().vocab_size)

    @property
    def max_length_tokens(self) -> int:
        """The longest sequence with exact positions."""
        return longest_sequence(self._model.config)

    @property
    def rope_length_limit(self) -> int | None:
        """Sequences longer than this must not share a batch with shorter ones."""
        return rope_length_limit(self._model.config)

    @property
    def weights_bytes(self) -> int:
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in self._model.parameters()}.values())

    def use_norms(self, dtype: torch.dtype) -> None:
        """Compute the norms in a dtype, and round their results once to the model's own."""
        norms_in(self._model, dtype)

    @torch.inference_mode()
    def padded_values(self, sequences: Sequence[IdArray], positions: Sequence[Index]) -> Tensor:
        """Values after the tokens at `positions`, indices into their sequence, in order: [S] float32."""
        row_S = torch.from_numpy(np.repeat(np.arange(len(positions)), [len(p) for p in positions])).to(self.device)
        column_S = torch.from_numpy(np.concatenate(positions)).long().to(self.device)
        return self._values(self._states(padded_ids(sequences).to(self.device))[row_S, column_S])

    @torch.inference_mode()
    def values(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[float]:
        """Values after each token of a response by the plainest path: one sequence, no padding. Probes use it."""
        ids_1L = torch.tensor([[*prompt_ids, *response_ids]], device=self.device)
        return [float(x) for x in self._values(self._states(ids_1L)[0, len(prompt_ids) :])]

    def _states(self, ids_BL: Tensor) -> Tensor:
        """[B, L, D]: the inputs of the last layer."""
        states: Tensor = self._model.base_model(**all_visible(ids_BL), use_cache=False).last_hidden_state
        return states

    def _values(self, states_SD: Tensor) -> Tensor:
        return functional.linear(states_SD.float(), self._weight_1D, self._bias_1)[..., 0]

    @torch.inference_mode()
    def _refuse_other_scores(self) -> None:
        padding = self._model.config.get_text_config().pad_token_id
        ids = [i for i in range(self.vocab_size) if i != padding][:CHECKED_TOKENS]
        ids_1L = torch.tensor([ids], device=self.device)
        own = float(self._model(**all_visible(ids_1L), use_cache=False).logits[0, 0])
        state_D = self._states(ids_1L)[0, -1]
        difference = abs(float(self._values(state_D)) - own)
        rounding = torch.finfo(self.dtype).eps * float((state_D.float() * self._weight_1D[0]).abs().sum())
        if not difference <= 16 * rounding + torch.finfo(torch.float32).tiny:
            raise CheckpointError(
                f"{type(self._model).__name__} scores a text otherwise than by its layer `score` after the last token "
                f"(difference {difference:.2g}), so it cannot be served as a token head"
            )


class HeadEngine:
    """Scores trunks by one token head. `alone`: no sequence shares a forward with another."""

    def __init__(self, model: HeadModel, info: EngineInfo, *, max_batch_tokens: int, alone: bool = False) -> None:
        self._model = model
        self._info = info
        self._max_batch_tokens = 1 if alone else max_batch_tokens  # a batch holds at least one sequence

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def model(self) -> HeadModel:
        return self._model

    def cost(self, trunk: Trunk) -> Cost:
        """Every token of every sequence: prompts are not shared."""
        prompt = len(trunk.prompt_P)
        return Cost(0, tuple(prompt + len(b.ids_T) if b.scored_T.any() else 0 for b in trunk.branches))

    def score(self, trunks: Sequence[Trunk], wants: Wants) -> Scores:
        """Prepare a batch and compute it."""
        return self.prepare(trunks, wants)()

    def prepare(self, trunks: Sequence[Trunk], wants: Wants) -> Work:
        """`wants` asks for nothing here: requests for what a head lacks are refused earlier."""
        batches = [*_batches(_rows(trunks), self._max_batch_tokens, self._model.rope_length_limit)]
        return partial(with_device_errors, partial(self._scores, trunks, batches))

    def _scores(self, trunks: Sequence[Trunk], batches: Sequence[Sequence[Row]]) -> Scores:
        # Branches without a scored token are in no batch and keep their empty scores.
        found = [[head_scores(np.empty(0, dtype=np.float32)) for _ in trunk.branches] for trunk in trunks]
        for batch in batches:
            values_S = self._model.padded_values([row.ids_L for row in batch], [row.position_S for row in batch])
            lengths = [len(row.position_S) for row in batch]
            for row, own_S in zip(batch, np.split(values_S.cpu().numpy(), np.cumsum(lengths)[:-1]), strict=True):
                found[row.trunk][row.branch] = head_scores(own_S)
        return found


def _rows(trunks: Sequence[Trunk]) -> list[Row]:
    """The sequences that have a scored token."""
    return [
        Row(t, b, np.concatenate([trunk.prompt_P, branch.ids_T]), len(trunk.prompt_P) + np.flatnonzero(branch.scored_T))
        for t, trunk in enumerate(trunks)
        for b, branch in enumerate(trunk.branches)
        if branch.scored_T.any()
    ]


def _batches(rows: Sequence[Row], max_tokens: int, length_limit: int | None) -> Iterator[list[Row]]:
    """Batches of at most `max_tokens` after padding, or of one longer sequence; none is on both sides of the limit."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: len(row.ids_L)):
        length = len(row.ids_L)
        crosses = bool(batch) and length_limit is not None and len(batch[0].ids_L) <= length_limit < length
        if batch and (crosses or (len(batch) + 1) * length > max_tokens):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def load_head(
    folder: Path, manifest: Manifest, *, dtype: str, device: str, make_room: MakeRoom = no_room_needed
) -> HeadModel:
    """A checkpoint's token head in `dtype`. Raises CheckpointError, also if its vocabulary is not the manifest's."""
    folders = weight_folders(folder, manifest)
    head = HeadModel(load_weights(*folders, DTYPES[dtype], head=True, device=device, make_room=make_room))
    if head.vocab_size != manifest.vocabulary:
        raise CheckpointError(
            f"{folder}: the model has {head.vocab_size} ids, but its manifest states {manifest.vocabulary}: adopt the "
            "checkpoint again"
        )
    return head
