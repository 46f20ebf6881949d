"""Every quantity of every scored token of some trunks, computed by the engine's parts and by plain transformers."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from dense_reward.batching.packing import Packed, leaves, pack
from dense_reward.batching.padding import padded_batches
from dense_reward.engines.torch.logprobs import ModelRows, ScoredRows, Tiling, score_rows
from dense_reward.engines.torch.model import TorchModel, device_row
from dense_reward.engines.torch.pair import Batch, _wanted_ids
from dense_reward.records import Trunk, Wants
from tiny_models import continued, plain_logprobs, random_trunk
from torch import Tensor
from transformers import PreTrainedModel

ALL = Wants(kl=True, entropy=True, varentropy=True, top_k=4)
SMALL_TILES = Tiling(rows=5, vocab=100)
_FIRST = random_trunk(1, 9, (13, 0, 5, 8, 13), k=2)
TRUNKS = (
    _FIRST,
    random_trunk(2, 3, (1, 17), masked=True, k=2),
    random_trunk(3, 1, (6, 6), k=2),
    *continued(_FIRST, random_trunk(4, 20, (7, 4), k=2), random_trunk(5, 3, (9,), k=2)),
)
"""Prompts and branches on both sides of every window and rope length limit; the last two continue the first one."""


def batches_of(trunks: Sequence[Trunk], model: TorchModel, *, packed: bool, max_tokens: int = 100) -> list[Batch]:
    """The batches that the engine would compute, in order."""
    rope_length_limits = [] if model.rope_length_limit is None else [model.rope_length_limit]
    if packed:
        return [
            Batch(partial(_packed_rows, row=row), row.leaves, row.row_S)
            for row in pack(trunks, max_tokens=max_tokens, rope_length_limits=rope_length_limits)
        ]
    return [
        Batch(partial(TorchModel.padded_rows, sequences=row.ids, positions=row.positions), row.leaves, row.row_S)
        for row in padded_batches(
            leaves(trunks, rope_length_limits), max_tokens=max_tokens, rope_length_limits=rope_length_limits
        )
    ]


def _packed_rows(model: TorchModel, row: Packed) -> Tensor:
    return model.packed_rows(device_row(row, model.device))


def rows_of(sft: TorchModel, reference: TorchModel, batch: Batch, tiling: Tiling | None = SMALL_TILES) -> ScoredRows:
    with torch.inference_mode():
        models = ModelRows(batch.rows(sft), sft.head), ModelRows(batch.rows(reference), reference.head)
        return score_rows(*models, _wanted_ids(batch), ALL, tiling=tiling)


def scored(
    sft: TorchModel, reference: TorchModel, batch: Batch, tiling: Tiling | None = SMALL_TILES
) -> Mapping[str, Tensor]:
    """Every quantity of every scored token of a batch, in the models' own dtype."""
    rows, row_S = rows_of(sft, reference, batch, tiling), torch.from_numpy(batch.row_S)
    of_rows = {
        "kl": rows.kl_R,
        "entropy": rows.entropy_R,
        "varentropy": rows.varentropy_R,
        "top": rows.top_sft_logprob_RK,
    }
    count = len(row_S)
    return {
        "sft": rows.sft_logprob_J[:count],
        "reference": rows.reference_logprob_J[:count],
        "candidates": (rows.sft_logprob_J - rows.reference_logprob_J)[count:],
    } | {name: found[row_S] for name, found in of_rows.items() if found is not None}


def expected(sft: PreTrainedModel, reference: PreTrainedModel, batch: Batch) -> Mapping[str, Tensor]:
    """The same, from plain forwards of one sequence each; in float64 from the logits on."""
    p, q = (
        torch.cat(
            [
                plain_logprobs(model, leaf.prompt_P, leaf.source.ids_T)[torch.from_numpy(leaf.scored_S)]
                for leaf in batch.leaves
            ]
        )
        for model in (sft, reference)
    )
    targets = np.concatenate([leaf.source.ids_T[leaf.scored_S] for leaf in batch.leaves])
    candidates = [leaf.source.candidates_SK for leaf in batch.leaves]
    candidates_SK = torch.from_numpy(np.concatenate([ids for ids in candidates if ids is not None])).long()
    targets_S1 = torch.from_numpy(targets).long()[:, None]
    return {
        "sft": p.gather(1, targets_S1)[:, 0],
        "reference": q.gather(1, targets_S1)[:, 0],
        "candidates": (p - q).gather(1, candidates_SK).flatten(),
        "kl": (p.exp() * (p - q)).sum(1),
        "entropy": -(p.exp() * p).sum(1),
        "varentropy": (p.exp() * p.square()).sum(1) - (p.exp() * p).sum(1).square(),
        "top": p.sort(dim=1, descending=True).values[:, : ALL.top_k],
    }
