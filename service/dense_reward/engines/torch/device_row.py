"""A packed row on a device."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dense_reward.batching.packing import Index, Packed
from dense_reward.engines.torch.attention import RowPlan
from dense_reward.engines.torch.varlen import on_device, varlen_of
from dense_reward.records import IdArray


@dataclass(frozen=True, slots=True)
class DeviceRow:
    """A packed row on a device: N tokens, R of them predict. `plan` says which tokens attend to which."""

    ids_1N: Tensor
    positions_1N: Tensor
    rows_R: Tensor
    plan: RowPlan


def device_row(packed: Packed, device: torch.device) -> DeviceRow:
    """Copy a row to a device; to a CUDA device with the index tensors for its variable-length kernels."""

    def copied(array: IdArray | Index) -> Tensor:
        return on_device(array.astype(np.int64), device)

    varlen = varlen_of(packed.trees, device) if device.type == "cuda" else None
    plan = RowPlan(packed.trees, varlen)
    return DeviceRow(copied(packed.ids_N)[None], copied(packed.positions_N)[None], copied(packed.rows_R), plan)
