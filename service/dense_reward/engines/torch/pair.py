"""Both checkpoints together: trunks -> forwards of both models -> scores of every branch."""

from collections.abc import Callable, Collection, Iterator, Sequence, Set
from dataclasses import dataclass, fields
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from dense_reward.batching.packing import Leaf, Packed, computed_tokens, leaves, pack
from dense_reward.batching.padding import padded_batches
from dense_reward.batching.prefix_trees import Index
from dense_reward.engines.torch.device import start_host_copy, with_device_errors
from dense_reward.engines.torch.logprobs import ModelRows, ScoredRows, WantedIds, WantedLogits, score_pairs
from dense_reward.engines.torch.memory import stored_bytes
from dense_reward.engines.torch.model import TorchModel, device_row
from dense_reward.engines.torch.shared_layers import computed_once, links_of
from dense_reward.records import (
    Branch,
    Cost,
    Engine,
    EngineInfo,
    FloatArray,
    IdArray,
    Scores,
    StagedWork,
    TokenScores,
    Trunk,
    Wants,
    Work,
    no_scores,
)

QUANTITIES = frozenset({"kl", "centred", "entropy", "varentropy", "candidate_reward", "alternatives"})

CANDIDATES_PER_TOKEN = 512
"""So many candidate ids count as one more computed token: they cost memory, not time."""
Array = TypeVar("Array", FloatArray, IdArray)


@dataclass(frozen=True, slots=True)
class ComputeOptions:
    """How a pair is computed. `alone`: no sequence shares a forward with another."""

    max_batch_tokens: int
    packed: bool = True
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward of each model: `rows` computes a model's R rows, `row_S` is the row of each scored token.

    `tokens`: how many go through each model, padding not counted.
    """

    rows: Callable[[TorchModel], Tensor]
    leaves: tuple[Leaf, ...]
    row_S: Index
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class HostRows:
    """ScoredRows on the host: float32, ids int32."""

    sft_logprob_J: FloatArray
    reference_logprob_J: FloatArray
    kl_R: FloatArray | None
    entropy_R: FloatArray | None
    varentropy_R: FloatArray | None
    top_ids_RK: IdArray | None
    top_sft_logprob_RK: FloatArray | None
    top_reference_logprob_RK: FloatArray | None


class PairEngine:
    """Two models of one vocabulary, each on its device; both output layers run on the sft model's device."""

    def __init__(
        self,
        sft: TorchModel,
        reference: TorchModel,
        info: EngineInfo,
        options: ComputeOptions,
        *,
        shared_layers: int = 0,
    ) -> None:
        """`shared_layers`: so many of the lowest layers are proven equal, see shared_layers.py."""
        self.shared_layers = shared_layers
        self._sft = sft
        self._reference = reference
        self._info = info
        self._compute_options = options
        self.rope_length_limits = frozenset(
            n for n in (sft.rope_length_limit, reference.rope_length_limit) if n is not None
        )

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def models(self) -> tuple[TorchModel, TorchModel]:
        """sft and reference; other pairs can share them."""
        return self._sft, self._reference

    @property
    def weights_bytes(self) -> int:
        """Bytes of both models' weights; what they share counts once."""
        return stored_bytes(weight for model in self.models for weight in model.weights.values())

    def cost(self, trunk: Trunk) -> Cost:
        """The prompt counts once if rows are packed; else, or if sequences are computed alone, for each branch."""
        return self.cost_within(trunk, self.rope_length_limits)

    def cost_within(self, trunk: Trunk, rope_length_limits: Collection[int]) -> Cost:
        """The same with other length limits: see `packing.computed_tokens`."""
        prompt_tokens = len(trunk.prompt_P)
        scored = [bool(branch.scored_T.any()) for branch in trunk.branches]
        own = [
            computed_tokens(prompt_tokens, branch, rope_length_limits) + _candidates(branch) // CANDIDATES_PER_TOKEN
            for branch in trunk.branches
        ]
        if self._compute_options.packed and not self._compute_options.alone:
            return Cost(prompt_tokens if any(scored) else 0, tuple(own))
        return Cost(0, tuple(prompt_tokens + tokens if s else 0 for s, tokens in zip(scored, own, strict=True)))

    def score(self, trunks: Sequence[Trunk], wants: Wants) -> Scores:
        """Prepare a batch and compute it."""
        return self.prepare(trunks, wants)()

    def prepare(self, trunks: Sequence[Trunk], wants: Wants) -> Work:
        work = self.prepare_shared([self], trunks, wants)

        def launch() -> Callable[[], Scores]:
            collect = work.launch()
            return lambda: collect()[0]

        return StagedWork(launch, work.tokens)

    def shares_with(self, other: Engine) -> bool:
        """Whether they have a model in common and would compute it in the same way."""
        return (
            isinstance(other, PairEngine)
            and not {*self.models}.isdisjoint(other.models)
            and (self._compute_options, self.rope_length_limits, self._sft.device)
            == (other._compute_options, other.rope_length_limits, other._sft.device)
        )

    def prepare_shared(
        self, engines: Sequence[Engine], trunks: Sequence[Trunk], wants: Wants
    ) -> StagedWork[list[Scores]]:
        pairs = [engine for engine in engines if isinstance(engine, PairEngine)]
        if len(pairs) < len(engines):
            raise TypeError("a PairEngine shares models only with other PairEngines")
        sharing = _SharedModels(pairs, wants)
        batches: list[Batch] = with_device_errors(
            lambda: list(self.batches(trunks, sharing.devices, self.rope_length_limits))
        )
        launch = partial(with_device_errors, partial(sharing.launch, trunks, batches))
        return StagedWork(launch, sum(batch.tokens for batch in batches))

    def batches(
        self, trunks: Sequence[Trunk], devices: Set[torch.device], rope_length_limits: Collection[int]
    ) -> Iterator[Batch]:
        """The forwards of all branches with a scored token. Packed rows are copied to the devices of the models."""
        options, limits = self._compute_options, rope_length_limits
        if options.packed:
            for packed in pack(
                trunks, max_tokens=options.max_batch_tokens, rope_length_limits=limits, alone=options.alone
            ):
                yield Batch(_packed_rows(packed, devices), packed.leaves, packed.row_S, len(packed.ids_N))
            return
        # A batch holds at least one sequence, so with a budget of one token it holds exactly one.
        max_tokens = 1 if options.alone else options.max_batch_tokens
        for padded in padded_batches(leaves(trunks, limits), max_tokens=max_tokens, rope_length_limits=limits):
            rows = partial(TorchModel.padded_rows, sequences=padded.ids, positions=padded.positions)
            yield Batch(rows, padded.leaves, padded.row_S, sum(len(ids) for ids in padded.ids))


class _SharedModels:
    """Pairs with models in common: each model runs once on a batch, and layers that models share once for all of them.

    All output layers run on the first's device.
    """

    def __init__(self, pairs: Sequence[PairEngine], wants: Wants) -> None:
        self._wants = wants
        self._models = list(dict.fromkeys(model for pair in pairs for model in pair.models))
        index = self._models.index
        self._pairs = [(index(sft), index(reference)) for sft, reference in (pair.models for pair in pairs)]
        self._relations = [(*both, pair.shared_layers) for both, pair in zip(self._pairs, pairs, strict=True)]

    @property
    def devices(self) -> Set[torch.device]:
        return {model.device for model in self._models}

    def launch(self, trunks: Sequence[Trunk], batches: Sequence[Batch]) -> Callable[[], list[Scores]]:
        """Start all forwards and the copies of their results. The returned call waits for them: scores of each pair."""
        copies = [[_start_host_copy(scored) for scored in self._score_batch(batch)] for batch in batches]
        return partial(with_device_errors, partial(self._collect, trunks, batches, copies))

    def _collect(
        self, trunks: Sequence[Trunk], batches: Sequence[Batch], copies: Sequence[Sequence[Callable[[], HostRows]]]
    ) -> list[Scores]:
        # Branches without a scored token are in no batch and keep their empty scores.
        of_pairs = [
            [[no_scores(branch, self._wants) for branch in trunk.branches] for trunk in trunks] for _ in self._pairs
        ]
        for batch, copies_of_pairs in zip(batches, copies, strict=True):
            for results, copy in zip(of_pairs, copies_of_pairs, strict=True):
                for leaf, scores in zip(batch.leaves, _per_leaf(copy(), batch), strict=True):
                    results[leaf.trunk][leaf.branch] = scores
        return of_pairs

    @torch.inference_mode()
    def _score_batch(self, batch: Batch) -> list[ScoredRows]:
        device = self._models[0].device
        wanted = WantedLogits(_wanted_ids(batch), [model.head for model in self._models], device)
        with computed_once(links_of(self._models, self._relations)):
            rows = [ModelRows(batch.rows(model).to(device), model.head) for model in self._models]
        return score_pairs(rows, self._pairs, wanted, self._wants)


def _packed_rows(packed: Packed, devices: Set[torch.device]) -> Callable[[TorchModel], Tensor]:
    copies = {device: device_row(packed, device) for device in devices}
    return lambda model: model.packed_rows(copies[model.device])


def _candidates(branch: Branch) -> int:
    return 0 if branch.candidates_SK is None else branch.candidates_SK.size


def _wanted_ids(batch: Batch) -> WantedIds:
    """The ids whose log-probs are wanted: the targets of all sequences, then the candidates of all sequences.

    `_per_leaf` cuts the results in the same order.
    """
    targets = [leaf.source.ids_T[leaf.scored_S] for leaf in batch.leaves]
    candidates = [leaf.source.candidates_SK for leaf in batch.leaves]
    rows_of = np.split(batch.row_S, np.cumsum([len(ids) for ids in targets])[:-1])
    wanted = [(ids_SK, rows) for ids_SK, rows in zip(candidates, rows_of, strict=True) if ids_SK is not None]
    return WantedIds(
        np.concatenate([batch.row_S, *(np.repeat(rows, ids_SK.shape[1]) for ids_SK, rows in wanted)]),
        np.concatenate([*targets, *(ids_SK.ravel() for ids_SK, _ in wanted)]),
    )


def _per_leaf(found: HostRows, batch: Batch) -> Iterator[TokenScores]:
    """The scores of each sequence of a batch."""
    sft_J, reference_J = found.sft_logprob_J, found.reference_logprob_J
    at, candidate_at = 0, len(batch.row_S)
    for leaf in batch.leaves:
        part, candidates_SK = slice(at, at + len(leaf.scored_S)), leaf.source.candidates_SK
        rows, at = batch.row_S[part], part.stop
        candidate_sft_SK = candidate_reference_SK = None
        if candidates_SK is not None and candidates_SK.shape[1]:
            own = slice(candidate_at, candidate_at + candidates_SK.size)
            candidate_at = own.stop
            candidate_sft_SK = sft_J[own].reshape(candidates_SK.shape)
            candidate_reference_SK = reference_J[own].reshape(candidates_SK.shape)
        yield TokenScores(
            sft_J[part],
            reference_J[part],
            kl_S=_taken(found.kl_R, rows),
            entropy_S=_taken(found.entropy_R, rows),
            varentropy_S=_taken(found.varentropy_R, rows),
            candidate_sft_logprob_SK=candidate_sft_SK,
            candidate_reference_logprob_SK=candidate_reference_SK,
            top_ids_SK=_taken(found.top_ids_RK, rows),
            top_sft_logprob_SK=_taken(found.top_sft_logprob_RK, rows),
            top_reference_logprob_SK=_taken(found.top_reference_logprob_RK, rows),
        )


def _start_host_copy(scored: ScoredRows) -> Callable[[], HostRows]:
    """Start to copy results from the device, all of them in one piece. The returned call waits for the copy."""
    given_names = [field.name for field in fields(scored)]
    tensors = {name: values for name in given_names if (values := getattr(scored, name)) is not None}
    # Integers as the bits of floats: one tensor has one dtype.
    bits = {name: v.float() if v.is_floating_point() else v.int().view(torch.float32) for name, v in tensors.items()}
    wait = start_host_copy(torch.cat([values.flatten() for values in bits.values()]))
    # Only what remains to be known: the tensors' memory is free for the next batch.
    layout = [(name, values.shape, values.is_floating_point()) for name, values in tensors.items()]

    def collect() -> HostRows:
        parts = np.split(wait(), np.cumsum([shape.numel() for _, shape, _ in layout])[:-1])
        found = {
            name: (part if is_float else part.view(np.int32)).reshape(shape)
            for (name, shape, is_float), part in zip(layout, parts, strict=True)
        }
        return HostRows(**{name: found.get(name) for name in given_names})  # type: ignore[arg-type]

    return collect


def _taken(values: Array | None, rows: Index) -> Array | None:
    return None if values is None else values[rows]
