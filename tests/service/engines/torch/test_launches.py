"""What a batch launches on a GPU, counted on torch's meta device: operators run there without computing anything.

The code is that of a GPU. Replaced are only the two kernels, and what looks at numbers: the experiment that finds the
output layer.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from dense_reward.batching.packing import Packed, pack
from dense_reward.engines.kernels import fused_sums, varlen
from dense_reward.engines.kernels.varlen import Call, Heads, varlen_of
from dense_reward.engines.torch import logprobs, model
from dense_reward.engines.torch.attention import RowPlan
from dense_reward.engines.torch.heads import LinearHead, PostProcessing
from dense_reward.engines.torch.logprobs import ModelRows, Tiling, WantedLogits, score_pairs
from dense_reward.engines.torch.model import DeviceRow, TorchModel, device_row
from dense_reward.engines.torch.pair import Batch, _wanted_ids
from dense_reward.records import Wants
from tiny_models import continued, random_trunk, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")
TRUNKS = [random_trunk(1, 40, (50, 9, 9)), random_trunk(2, 30, (20, 20, 7))]
TRUNKS += continued(TRUNKS[0], random_trunk(3, 20, (30,)))
WAITING = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.item.default", "aten.equal.default"}
"""Operators that wait for the device, because the host needs their result."""
WANTS = {
    "log-probs": Wants(),
    "kl": Wants(kl=True),
    "everything but the likeliest ids": Wants(kl=True, entropy=True, varentropy=True),
}


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators, and keeps the size of each new result."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: Counter[str] = Counter()
        self.results: list[tuple[str, torch.Size, torch.dtype]] = []

    def __torch_dispatch__(
        self,
        function: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        found: object = function(*args, **(kwargs or {}))
        self.operators[str(function)] += 1
        if isinstance(found, Tensor) and not _is_same(str(function), args[0] if args else None, found):
            self.results.append((str(function), found.shape, found.dtype))
        return found

    @property
    def waiting(self) -> set[str]:
        return WAITING & self.operators.keys()


def _is_same(name: str, given: object, found: Tensor) -> bool:
    """Whether a conversion had nothing to convert."""
    return name.startswith("aten.to.") and isinstance(given, Tensor) and given.dtype == found.dtype


def flash(heads: Heads, call: Call, _: float, __: int | None) -> tuple[Tensor, Tensor]:
    """A kernel's results, without their numbers."""
    q, k, v = heads
    assert len(q) == call.part.stop - call.part.start
    assert len(k) == len(v) == (len(q) if call.key_K is None else len(call.key_K))
    return torch.empty_like(q), torch.empty(q.shape[1], len(q), device=q.device)


@pytest.fixture
def packed() -> Packed:
    (row,) = pack(TRUNKS, max_tokens=1000)
    return row


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> TorchModel:
    """A model in bfloat16 without numbers, which believes to be on a GPU."""

    def known_head(whole: torch.nn.Module, _: object) -> LinearHead:
        return LinearHead(whole.get_output_embeddings().weight, None, PostProcessing())  # type: ignore[operator]

    monkeypatch.setattr(model, "linear_head", known_head)
    monkeypatch.setattr(varlen, "_kernel", lambda: flash)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: tensor.device == META), raising=False)
    return TorchModel(tiny_model("qwen2", dtype=torch.bfloat16).to(META))


def row_of(packed: Packed) -> DeviceRow:
    """As `device_row` on a GPU."""
    row = device_row(packed, META)
    return DeviceRow(row.ids_1N, row.positions_1N, row.rows_R, RowPlan(packed.trees, varlen_of(packed.trees, META)))


def test_a_forward_copies_each_layers_keys_once_and_waits_for_nothing(on_meta: TorchModel, packed: Packed) -> None:
    row = row_of(packed)
    with Counted() as counted, torch.inference_mode():
        on_meta.packed_rows(row)
    layers = on_meta.transformers_model.config.num_hidden_layers
    (call,) = row.plan.varlen or ()
    assert call.key_K is not None
    gathered = [shape for name, shape, _ in counted.results if name == "aten.index_select.default"]
    assert len(gathered) == 2 * layers, "keys and values, once each"
    assert {shape[0] for shape in gathered} == {len(call.key_K)}
    assert not counted.waiting


@pytest.mark.parametrize("name", WANTS)
def test_logits_are_written_once_and_read_once(
    on_meta: TorchModel, packed: Packed, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 bytes written and 8 read for each pair of logits: the matmuls' results in float32, and one kernel for both."""
    launched: list[tuple[Tensor, Tensor]] = []

    def launch(grid: tuple[int, ...]) -> Callable[..., None]:
        def run(sft: Tensor, reference: Tensor, *_: object, **__: object) -> None:
            assert grid == (len(sft),)
            launched.append((sft, reference))

        return run

    class Launched:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return launch(grid)

    monkeypatch.setattr(fused_sums, "_absorb", Launched())
    monkeypatch.setattr(logprobs, "_can_fuse", lambda _: True)
    rows_RD = torch.empty(len(packed.rows_R), on_meta.transformers_model.config.hidden_size, dtype=torch.bfloat16)
    tiling, vocab_size = Tiling(24, 128), on_meta.head.vocab_size
    batch = Batch(lambda _: rows_RD, packed.leaves, packed.row_S)
    wanted = WantedLogits(_wanted_ids(batch), [on_meta.head, on_meta.head], META, tiling=tiling)
    models = [ModelRows(rows_RD.to(META), on_meta.head)] * 2
    with Counted() as counted, torch.inference_mode():
        score_pairs(models, ((0, 1),), wanted, WANTS[name])
    chunks, tiles = -(-len(rows_RD) // tiling.rows), -(-vocab_size // tiling.vocab)
    assert len(launched) == chunks * tiles
    rows = {min(tiling.rows, len(rows_RD) - tiling.rows * c) for c in range(chunks)}
    words = {min(tiling.vocab, vocab_size - tiling.vocab * t) for t in range(tiles)}
    of_tiles = [(name, dtype) for name, shape, dtype in counted.results if shape in product(rows, words)]
    assert {dtype for _, dtype in of_tiles} == {torch.float32}
    assert Counter(operator for operator, _ in of_tiles) == {"aten.mm.dtype": 2 * chunks * tiles}
    assert not counted.waiting


def test_what_is_asked_of_the_device_is_known_to_wait() -> None:
    """The counter sees what it is to find."""
    with Counted() as counted:
        SimpleNamespace(value=torch.ones(1).item())
    assert counted.waiting
