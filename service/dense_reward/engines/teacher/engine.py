"""A pair as a teacher: one distribution made of both models' logits, its log-probs, ranks and likeliest ids.

Logits are computed for about as many rows at once as fit into the memory of a tile of /score, but over the whole
vocabulary: a rank compares an id with all others. A model with weight 0 in the distribution is not run.

Every branch is extended by one token, whose row gives the likeliest next id. Its own id changes nothing: the last token
of a sequence is only predicted.

Shapes: R rows that predict a token, C rows of a chunk, V vocabulary size, S scored tokens (the targets), J candidate
ids, each at one row, K likeliest ids.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dense_reward.engines.kernels.varlen import on_device
from dense_reward.engines.torch.device import with_device_errors
from dense_reward.engines.torch.logprobs import CPU_TILING, CUDA_TILING, ModelRows, WantedIds
from dense_reward.engines.torch.model import TorchModel
from dense_reward.engines.torch.pair import Batch, PairEngine
from dense_reward.engines.torch.shared_layers import computed_once, links_of
from dense_reward.records import (
    Branch,
    Cost,
    EngineInfo,
    FloatArray,
    IdArray,
    Scores,
    Teacher,
    TeacherScores,
    TokenScores,
    Trunk,
    Wants,
    Work,
    teacher_scores,
)

LEAST_ROWS = 128
"""Rows of a chunk at least: with fewer, the output layer's weights are read too often for the work that they do."""


@dataclass(frozen=True, slots=True)
class TeacherRows:
    """Log-probs under the teacher, in nats: of targets, with the ids that are likelier, of candidates, of top ids."""

    target_logprob_S: FloatArray
    likelier_S: IdArray
    candidate_logprob_J: FloatArray
    top_ids_RK: IdArray
    top_logprob_RK: FloatArray


@dataclass(frozen=True, slots=True)
class TorchTeacher:
    """The engine of one teacher. All output layers run on the device of the pair's sft model."""

    pair: PairEngine
    teacher: Teacher

    @property
    def info(self) -> EngineInfo:
        return self.pair.info

    def cost(self, trunk: Trunk) -> Cost:
        return self.pair.cost_within(_extended(trunk), self._limits)

    def prepare(self, trunks: Sequence[Trunk], wants: Wants) -> Work:
        del wants
        devices = {model.device for model, _ in self._weighted}
        extended = [_extended(trunk) for trunk in trunks]
        batches: list[Batch] = with_device_errors(lambda: list(self.pair.batches(extended, devices, self._limits)))
        return partial(with_device_errors, partial(self._scores, trunks, batches))

    @property
    def _limits(self) -> Collection[int]:
        """The limits as extended sequences meet them: the token that extends a sequence does not make it longer."""
        return [limit + 1 for limit in self.pair.rope_length_limits]

    @property
    def _weighted(self) -> list[tuple[TorchModel, float]]:
        """The models that are run, with the weights of their logits."""
        both = zip(self.pair.models, (1 + self.teacher.tilt, -self.teacher.tilt), strict=True)
        return [(model, weight) for model, weight in both if weight]

    def _scores(self, trunks: Sequence[Trunk], batches: Sequence[Batch]) -> Scores:
        found: dict[tuple[int, int], TokenScores] = {}
        for batch in batches:
            scores = _per_leaf(self._rows(batch), batch, self.teacher.top_k)
            found |= {(leaf.trunk, leaf.branch): each for leaf, each in zip(batch.leaves, scores, strict=True)}
        return [[found[t, g] for g in range(len(trunk.branches))] for t, trunk in enumerate(trunks)]

    @torch.inference_mode()
    def _rows(self, batch: Batch) -> TeacherRows:
        device = self.pair.models[0].device
        models = [model for model, _ in self._weighted]
        relations = [(0, 1, self.pair.shared_layers)] if len(models) > 1 else []
        with computed_once(links_of(models, relations)):
            rows = [ModelRows(batch.rows(model).to(device), model.head) for model in models]
        weights = [weight / self.teacher.temperature for _, weight in self._weighted]
        return teacher_rows(rows, weights, _targets(batch), _candidates(batch), max(1, self.teacher.top_k))


def teacher_rows(
    models: Sequence[ModelRows], weights: Sequence[float], targets: WantedIds, candidates: WantedIds, k: int
) -> TeacherRows:
    """The log-softmax of the weighted sum of the models' logits, chunk by chunk of rows.

    Rows are on one device. An id that the first model rules out is ruled out, whatever the others give it.
    """
    head, rows_RX = models[0].head, models[0].rows_RX
    device, k = rows_RX.device, min(k, head.vocab_size)
    tiling = CPU_TILING if device.type == "cpu" else CUDA_TILING
    size = max(LEAST_ROWS, tiling.rows * tiling.vocab // head.vocab_size)
    target, candidate = _Picked(targets, size, device), _Picked(candidates, size, device)
    likelier: list[Tensor] = []
    top: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(rows_RX), size):
        logprob_CV = _logprobs(models, weights, slice(start, start + size))
        for logprob_NV, value_N in target.pick(logprob_CV, start, rows=True):
            likelier.append((logprob_NV > value_N[:, None]).sum(dim=1))
        for _ in candidate.pick(logprob_CV, start, rows=False):
            pass
        values_CK, ids_CK = logprob_CV.topk(k, dim=1)
        top.append((ids_CK.int(), values_CK.float()))
    ids_RK, values_RK = (torch.cat(parts).cpu().numpy() for parts in zip(*top, strict=True))
    return TeacherRows(
        target.values(),
        torch.cat(likelier).cpu().numpy()[target.back_J].astype(np.int32),
        candidate.values(),
        ids_RK,
        values_RK,
    )


def _logprobs(models: Sequence[ModelRows], weights: Sequence[float], part: slice) -> Tensor:
    """[C, V], at least in float32."""
    total_CV: Tensor | None = None
    ruled_out_CV: Tensor | None = None
    for model, weight in zip(models, weights, strict=True):
        logits_CV = model.head.logits(model.rows_RX[part], slice(0, model.head.vocab_size))
        logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
        if total_CV is None:
            # -inf times a negative weight is +inf, and -inf + inf is NaN: hence the mask
            ruled_out_CV = logits_CV == -torch.inf
            total_CV = logits_CV.mul_(weight)
        else:
            total_CV = total_CV.add_(logits_CV, alpha=weight)
    if total_CV is None or ruled_out_CV is None:
        raise ValueError("a teacher needs a model whose weight is not 0")
    total_CV = total_CV.masked_fill_(ruled_out_CV, -torch.inf)
    return total_CV.sub_(total_CV.logsumexp(dim=1, keepdim=True))


class _Picked:
    """The log-probs of wanted ids, picked chunk by chunk of rows. `back_J` puts them in the order of the wanted ids."""

    def __init__(self, wanted: WantedIds, chunk_rows: int, device: torch.device) -> None:
        order_J = np.argsort(wanted.row_J, kind="stable")
        self._sorted_J = wanted.row_J[order_J]
        self._row_J = on_device(self._sorted_J, device)
        self._id_J = on_device(wanted.id_J[order_J].astype(np.int64), device)
        self.back_J = np.argsort(order_J)
        self._chunk_rows = chunk_rows
        self._found: list[Tensor] = []

    def pick(self, logprob_CV: Tensor, start: int, *, rows: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Pick the ids of the chunk that begins at row `start`, at most as many at once as a chunk has rows.

        Yields the rows of those ids if `rows`, [N, V], and their log-probs, [N]. Iterate to the end.
        """
        first, end = np.searchsorted(self._sorted_J, [start, start + len(logprob_CV)])
        for at in range(first, end, self._chunk_rows):
            part = slice(at, min(at + self._chunk_rows, end))
            row_N = self._row_J[part] - start
            value_N = logprob_CV[row_N, self._id_J[part]]
            self._found.append(value_N)
            each_once = np.array_equal(self._sorted_J[part], np.arange(start, start + len(logprob_CV)))
            yield logprob_CV if each_once or not rows else logprob_CV[row_N], value_N

    def values(self) -> FloatArray:
        if not self._found:
            return np.empty(0, dtype=np.float32)
        return torch.cat(self._found).float().cpu().numpy()[self.back_J]


def _extended(trunk: Trunk) -> Trunk:
    return Trunk(trunk.prompt_P, tuple(map(_extended_branch, trunk.branches)))


def _extended_branch(branch: Branch) -> Branch:
    candidates_SK = branch.candidates_SK
    if candidates_SK is not None:
        candidates_SK = np.concatenate([candidates_SK, np.zeros_like(candidates_SK, shape=(1, candidates_SK.shape[1]))])
    return Branch(np.append(branch.ids_T, np.int32(0)), np.append(branch.scored_T, True), candidates_SK)


def _targets(batch: Batch) -> WantedIds:
    return WantedIds(batch.row_S, np.concatenate([leaf.source.ids_T[leaf.scored_S] for leaf in batch.leaves]))


def _candidates(batch: Batch) -> WantedIds:
    """The candidates of all leaves, in order. The row that extends a branch has some too, which are not read."""
    at = 0
    rows, ids = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int32)]
    for leaf in batch.leaves:
        row_S, at = batch.row_S[at : at + len(leaf.scored_S)], at + len(leaf.scored_S)
        if leaf.source.candidates_SK is not None:
            rows.append(np.repeat(row_S, leaf.source.candidates_SK.shape[1]))
            ids.append(leaf.source.candidates_SK.ravel())
    return WantedIds(np.concatenate(rows), np.concatenate(ids))


def _per_leaf(found: TeacherRows, batch: Batch, k: int) -> Iterator[TokenScores]:
    """The scores of each branch: its last scored token is the one that extended it."""
    at = candidate_at = 0
    for leaf in batch.leaves:
        part = slice(at, at + len(leaf.scored_S))
        row_S, at, candidates_SK = batch.row_S[part], part.stop, leaf.source.candidates_SK
        candidate_logprob_SK = None
        if candidates_SK is not None:
            own = slice(candidate_at, candidate_at + candidates_SK.size)
            candidate_at = own.stop
            candidate_logprob_SK = found.candidate_logprob_J[own].reshape(candidates_SK.shape)[:-1]
        yield teacher_scores(
            TeacherScores(
                found.target_logprob_S[part][:-1],
                found.likelier_S[part][:-1] + np.int32(1),
                found.top_ids_RK[row_S[:-1], :k],
                found.top_logprob_RK[row_S[:-1], :k],
                candidate_logprob_SK,
                int(found.top_ids_RK[row_S[-1], 0]),
                float(found.top_logprob_RK[row_S[-1], 0]),
            )
        )
