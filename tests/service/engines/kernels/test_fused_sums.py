"""The kernels for the sums over the vocabulary, against float64; that of a GPU by Triton's interpreter without one."""

import pytest
import torch
from dense_reward.engines.kernels.fused_sums import FusedSums, cannot_fuse
from dense_reward.engines.kernels.row_sums import TorchSums
from dense_reward.records import Wants
from kernel_ways import way  # noqa: F401
from torch import Tensor

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ALL = Wants(kl=True, entropy=True, varentropy=True, top_k=3)
LENGTHS = (1, 5, 100, 1000)


def logits(seed: int, words: int, dtype: torch.dtype = torch.float32, rows: int = 5) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [(4 * torch.randn(rows, words, generator=random)).to(DEVICE, dtype) for _ in range(2)]


def summed(tensors: list[Tensor], tile: int, wants: Wants, pairs: tuple[tuple[int, int], ...] = ((0, 1),)) -> FusedSums:
    sums = FusedSums(len(tensors), pairs, wants)
    for start in range(0, tensors[0].shape[1], tile):
        sums.add([each[:, start : start + tile].contiguous() for each in tensors], start)
    return sums


def exact_varentropy(logprobs: Tensor) -> Tensor:
    """The variance of the log-prob of a drawn id, by its definition."""
    mean = (logprobs.exp() * logprobs).sum(1, keepdim=True)
    return (logprobs.exp() * (logprobs - mean).square()).sum(1)


def assert_exact(sums: FusedSums, tensors: list[Tensor], at: int = 0, pair: tuple[int, int] = (0, 1)) -> None:
    """Within the rounding of float32 sums of float64 over all ids."""
    rounding = 5e-6 * max(1.0, tensors[0].shape[1] / 2048)
    sft, reference = (tensors[model].double().log_softmax(1) for model in pair)
    kl, entropy, varentropy, ids, top_sft, top_reference = sums.quantities(at)
    expected = {
        "log sum exp": (sums.log_totals()[pair[0]], tensors[pair[0]].double().logsumexp(1)),
        "of the reference": (sums.log_totals()[pair[1]], tensors[pair[1]].double().logsumexp(1)),
        "kl": (kl, (sft.exp() * (sft - reference)).sum(1)),
        "entropy": (entropy, -(sft.exp() * sft).sum(1)),
        "varentropy": (varentropy, exact_varentropy(sft)),
        "alternatives": (top_sft, sft.topk(min(3, sft.shape[1]), 1).values),
    }
    for name, (found, exact) in expected.items():
        assert found is not None
        assert (found.double() - exact).abs().max() <= rounding + 1e-6 * exact.abs().max(), name
    assert ids is not None
    assert top_reference is not None
    torch.testing.assert_close(top_reference.double(), reference.gather(1, ids), atol=5e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("words", "tile"), [(1, 1), (3, 2), (100, 100), (1000, 333), (5000, 4500)])
def test_the_sums_are_those_over_the_whole_vocabulary(words: int, tile: int, dtype: torch.dtype) -> None:
    tensors = logits(words, words, dtype)
    assert_exact(summed(tensors, tile, ALL), tensors)


def test_several_pairs_share_models() -> None:
    tensors = [*logits(1, 70), logits(2, 70)[0]]
    pairs = ((0, 1), (2, 1), (0, 2))
    sums = summed(tensors, 32, ALL, pairs)
    for at, pair in enumerate(pairs):
        assert_exact(sums, tensors, at, pair)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # 0 * inf, which is then left out
def test_ids_that_a_model_rules_out_add_nothing() -> None:
    tensors = logits(3, 40)
    tensors[0][:, ::2] = -torch.inf
    tensors[1][:, ::2] = -torch.inf
    sums = summed(tensors, 16, Wants(kl=True, entropy=True, varentropy=True))
    sft, reference = (each[:, 1::2].double().log_softmax(1) for each in tensors)
    kl, entropy, varentropy, *_ = sums.quantities(0)
    assert kl is not None
    assert entropy is not None
    assert varentropy is not None
    torch.testing.assert_close(varentropy.double(), exact_varentropy(sft), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(kl.double(), (sft.exp() * (sft - reference)).sum(1), atol=5e-6, rtol=0)
    torch.testing.assert_close(entropy.double(), -(sft.exp() * sft).sum(1), atol=5e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # 0 * inf, which is then left out
@pytest.mark.parametrize("sums_of", [FusedSums, TorchSums])
@pytest.mark.parametrize("tile", [96, 300])
@pytest.mark.parametrize("offset", [0.0, 1000.0], ids=["at zero", "far from zero"])
@pytest.mark.parametrize("peak", [3.0, 15.0, 200.0])
def test_the_variance_of_a_peaked_distribution_does_not_cancel(
    peak: float, offset: float, tile: int, sums_of: type[FusedSums | TorchSums]
) -> None:
    """One id is likelier than the next by `peak` nats, first or last in the vocabulary, after tiles that rise."""
    random = torch.Generator().manual_seed(int(peak))
    rows = torch.randn(3, 300, generator=random)
    rows[0, 0] += peak
    rows[1, 299] += peak
    rows[2] = torch.linspace(-peak, peak, 300)
    rows[2, :150] = -torch.inf
    logits_CW = (rows + offset).to(DEVICE)
    sums = sums_of(2, ((0, 1),), Wants(varentropy=True))
    for start in range(0, 300, tile):
        part = logits_CW[:, start : start + tile]
        sums.add([part.clone(), part.clone()], start)
    varentropy = sums.quantities(0)[2]
    assert varentropy is not None
    exact = torch.where(logits_CW.isinf(), -1e4, logits_CW.double().log_softmax(1))
    torch.testing.assert_close(varentropy.double(), exact_varentropy(exact), atol=1e-9, rtol=2e-5)


@pytest.mark.parametrize("sums_of", [FusedSums, TorchSums])
def test_equal_logits_have_no_variance_and_one_id_neither(sums_of: type[FusedSums | TorchSums]) -> None:
    for words in (1, 40):
        sums = sums_of(2, ((0, 1),), Wants(varentropy=True))
        for start in range(0, words, 16):
            width = min(16, words - start)
            sums.add([torch.full((2, width), 12.5, device=DEVICE) for _ in range(2)], start)
        varentropy = sums.quantities(0)[2]
        assert varentropy is not None
        assert varentropy.tolist() == [0.0, 0.0]


def test_what_is_not_requested_keeps_no_sums() -> None:
    assert summed(logits(7, 10), 10, ALL).quantities(0)[2] is not None
    assert summed(logits(7, 10), 10, Wants(kl=True, entropy=True)).quantities(0)[2] is None


def test_large_logits_do_not_overflow_and_equal_models_have_no_kl() -> None:
    tensors = [each * 100 for each in logits(4, 300)]
    kl, *_ = summed([tensors[0], tensors[0]], 128, ALL).quantities(0)
    assert kl is not None
    assert torch.equal(kl, torch.zeros_like(kl))
    assert torch.isfinite(torch.stack(summed(tensors, 128, ALL).log_totals())).all()


def test_a_nan_stays_in_its_row() -> None:
    tensors = logits(5, 50)
    tensors[0][2, 7] = torch.nan
    total = summed(tensors, 50, Wants()).log_totals()[0]
    assert torch.isnan(total).tolist() == [False, False, True, False, False]


def test_no_rows_are_no_sums() -> None:
    sums = summed(logits(6, 10, rows=0), 10, Wants(kl=True))
    assert [len(total) for total in sums.log_totals()] == [0, 0]


def test_a_cpu_has_kernels_once_they_are_compiled(way: str) -> None:  # noqa: F811
    reason = None if way == "compiled" else "they were not compiled"
    assert cannot_fuse(torch.device("cpu"), torch.float32) == reason
    assert cannot_fuse(torch.device("cpu"), torch.float64) == "they were not compiled"
    assert cannot_fuse(torch.device("meta"), torch.float32) == "they run on GPUs, not on meta"


@pytest.mark.gpu
def test_it_compiles() -> None:
    assert cannot_fuse(torch.device("cuda"), torch.float32) is None
