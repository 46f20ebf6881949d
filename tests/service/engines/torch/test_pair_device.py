"""What a pair computes of a batch, its cost, and the errors of a device that cannot."""

from collections.abc import Callable, Sequence
from dataclasses import fields

import numpy as np
import pytest
import torch
from dense_reward.engines.torch import pair
from dense_reward.engines.torch.model import TorchModel
from dense_reward.engines.torch.pair import ComputeOptions, PairEngine
from dense_reward.errors import EngineLostError, OutOfMemoryError
from dense_reward.records import Branch, Cost, StagedWork, TokenScores, Trunk, Wants, launched
from dense_reward.reward import candidate_reward
from faulty_engines import INFO
from tiny_configs import LONG_TOKENS
from tiny_configs import PACKED as PACKED_ARCHITECTURES
from tiny_models import continued, random_trunk, tiny_model
from transformers import PreTrainedModel

TOLERANCE_NATS = 5e-5


def computed_by(model: PreTrainedModel) -> list[tuple[int, int]]:
    """The shape of each forward that follows, padding included."""
    shapes: list[tuple[int, int]] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    return shapes


def counted_engine(options: ComputeOptions, name: str = "llama") -> tuple[PairEngine, list[tuple[int, int]]]:
    sft, reference = (TorchModel(tiny_model(name, seed=seed, dtype=torch.float32)) for seed in (1, 2))
    return PairEngine(sft, reference, INFO, options), computed_by(sft.transformers_model)


PACKED, PADDED = ComputeOptions(1000), ComputeOptions(1000, packed=False)
ALONE, PADDED_ALONE = ComputeOptions(1000, alone=True), ComputeOptions(1000, packed=False, alone=True)
in_every_way = pytest.mark.parametrize("options", [PACKED, PADDED, ALONE, PADDED_ALONE], ids=str)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_no_more_tokens_than_the_budget_are_computed_at_once_but_for_a_longer_sequence(packed: bool) -> None:
    engine, shapes = counted_engine(ComputeOptions(64, packed=packed))
    engine.score([random_trunk(s, 5, tuple(range(s, 30, 3))) for s in range(3)] + [random_trunk(9, 70, (30,))], Wants())
    assert (1, 99) in shapes
    assert max(rows * length for rows, length in shapes if (rows, length) != (1, 99)) <= 64
    assert {rows for rows, _ in shapes} == {1} if packed else max(rows for rows, _ in shapes) > 4


@in_every_way
def test_branches_without_a_scored_token_cost_nothing_and_get_empty_scores_of_the_right_shape(
    options: ComputeOptions,
) -> None:
    engine, shapes = counted_engine(options)
    empty = random_trunk(0, 50, (0,) * 20, k=2)
    masked = Trunk(empty.prompt_P, (Branch(np.arange(9, dtype=np.int32), np.zeros(9, dtype=bool)),))
    answered = engine.score([empty, masked], Wants(kl=True, entropy=True, varentropy=True, top_k=3))
    assert shapes == []
    assert engine.cost(empty).tokens == engine.cost(masked).tokens == 0
    assert [len(branches) for branches in answered] == [20, 1]
    names = {field.name for field in fields(TokenScores)} - {"value_S", "teacher"}
    found = {name: getattr(answered[0][0], name).shape for name in names}
    assert {found.pop(f"top_{name}_SK") for name in ("ids", "sft_logprob", "reference_logprob")} == {(0, 3)}
    assert {found.pop(f"candidate_{name}_SK") for name in ("sft_logprob", "reference_logprob")} == {(0, 2)}
    assert set(found.values()) == {(0,)}
    assert candidate_reward(answered[1][0]) is None


@in_every_way
def test_what_comes_after_the_last_scored_token_is_not_computed_and_changes_nothing(options: ComputeOptions) -> None:
    engine, shapes = counted_engine(options)
    whole = random_trunk(0, 5, (30,))
    scored_T = np.zeros(30, dtype=bool)
    scored_T[[1, 3]] = True
    partly = Trunk(whole.prompt_P, (Branch(whole.branches[0].ids_T, scored_T),))
    found = engine.score([partly], Wants())[0][0]
    assert shapes == [(1, 8)]
    assert engine.cost(partly).tokens == 8
    every = engine.score([whole], Wants())[0][0]
    np.testing.assert_allclose(found.sft_logprob_S, every.sft_logprob_S[[1, 3]], atol=TOLERANCE_NATS)


@pytest.mark.parametrize(
    ("options", "cost"),
    [
        (PACKED, Cost(40, (5, 0, 0, 3, 5))),
        (ALONE, Cost(0, (45, 40, 0, 43, 45))),
        (PADDED, Cost(0, (45, 40, 0, 43, 45))),
        (PADDED_ALONE, Cost(0, (45, 40, 0, 43, 45))),
    ],
    ids=str,
)
def test_the_cost_of_a_trunk_is_what_is_computed_before_padding(options: ComputeOptions, cost: Cost) -> None:
    engine, shapes = counted_engine(options)
    trunk = random_trunk(0, 40, (6, 1, 0, 4, 6))
    engine.score([trunk], Wants())
    assert engine.cost(trunk) == cost
    padding = 7 if options == PADDED else 0
    assert sum(rows * length for rows, length in shapes) == cost.tokens + padding
    assert len(shapes) == (4 if options.alone else 1)


def test_equal_prompts_of_a_batch_cost_the_device_one() -> None:
    engine, shapes = counted_engine(PACKED)
    trunk = random_trunk(0, 40, (6, 4))
    engine.score([trunk] * 5, Wants())
    assert shapes == [(1, 40 + 5 * (5 + 3))]


def test_candidates_cost_something_too() -> None:
    engine, _ = counted_engine(PACKED)
    bare, few, many = (random_trunk(0, 10, (8, 2), k=k) for k in (0, 50, 1024))
    assert engine.cost(bare) == engine.cost(few) == Cost(10, (7, 1))
    assert engine.cost(many) == Cost(10, (7 + 8 * 2, 1 + 2 * 2))


@in_every_way
def test_a_sequence_that_reaches_beyond_a_longrope_border_is_turned_as_a_long_one_where_only_its_start_is_scored(
    options: ComputeOptions,
) -> None:
    whole = random_trunk(0, 5, (LONG_TOKENS,))
    scored_T = np.arange(LONG_TOKENS) < 3
    partly = Trunk(whole.prompt_P, (Branch(whole.branches[0].ids_T, scored_T),))
    engine, shapes = counted_engine(options, "longrope")
    found, every = (engine.score([trunk], Wants())[0][0] for trunk in (partly, whole))
    np.testing.assert_allclose(found.sft_logprob_S, every.sft_logprob_S[:3], atol=TOLERANCE_NATS)
    assert shapes == [(1, 5 + LONG_TOKENS), (1, 5 + LONG_TOKENS - 1)]
    assert engine.cost(partly).tokens == 5 + LONG_TOKENS


def test_a_batch_is_packed_before_its_work_is_called_and_computed_by_it() -> None:
    engine, shapes = counted_engine(PACKED)
    trunks = [random_trunk(0, 4, (6, 4))]
    work = engine.prepare(trunks, Wants())
    assert shapes == []
    found = work()
    assert len(shapes) == 1
    assert np.array_equal(found[0][1].sft_logprob_S, engine.score(trunks, Wants())[0][1].sft_logprob_S)


def refuse(error: Exception) -> Callable[[torch.nn.Module, tuple[torch.Tensor]], None]:
    def hook(_: torch.nn.Module, __: tuple[torch.Tensor]) -> None:
        raise error

    return hook


OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: out of memory: cannot allocate"),
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", ["model.embed_tokens", "lm_head"])
def test_memory_that_runs_out_in_the_model_or_its_head_is_reported_as_such(error: Exception, place: str) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    engine = PairEngine(TorchModel(model), TorchModel(model), INFO, PACKED)
    model.get_submodule(place).register_forward_pre_hook(refuse(error))
    with pytest.raises(OutOfMemoryError, match="allocate") as caught:
        engine.score([random_trunk(0, 3, (4, 4, 4))], Wants())
    assert caught.value.__context__ is None, "a traceback would keep the tensors of the batch alive"


def test_memory_that_runs_out_while_a_batch_is_prepared_is_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OUT_OF_MEMORY[0]

    engine, _ = counted_engine(PACKED)
    monkeypatch.setattr(pair, "device_row", full)
    with pytest.raises(OutOfMemoryError, match="Tried to allocate"):
        engine.prepare([random_trunk(0, 3, (4,))], Wants())


def test_the_errors_of_torch_itself_for_want_of_memory_are_recognised() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    engine = PairEngine(TorchModel(model), TorchModel(model), INFO, PACKED)
    model.lm_head.register_forward_pre_hook(lambda *_: torch.empty(1 << 60, dtype=torch.int8))
    with pytest.raises(OutOfMemoryError):
        engine.score([random_trunk(0, 3, (4, 4))], Wants())


@pytest.mark.parametrize(
    ("error", "raised_as"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), EngineLostError),
        (RuntimeError("Triton: device-side assert triggered"), EngineLostError),
        (RuntimeError("shapes do not fit"), RuntimeError),
    ],
)
def test_a_device_that_is_lost_is_told_apart_from_a_call_that_failed(
    error: Exception, raised_as: type[Exception]
) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    engine = PairEngine(TorchModel(model), TorchModel(model), INFO, PACKED)
    model.lm_head.register_forward_pre_hook(refuse(error))
    with pytest.raises(raised_as, match=str(error)):
        engine.score([random_trunk(0, 3, (4, 4))], Wants())


def on(device: str, name: str, dtype: torch.dtype, reference_device: str | None = None) -> list[TorchModel]:
    models = [TorchModel(tiny_model(name, seed=seed, dtype=dtype).to(device)) for seed in (1, 2)]
    if reference_device is not None:
        models[1] = TorchModel(tiny_model(name, seed=2, dtype=dtype).to(reference_device))
        models[1].use_head(device=models[0].device, dtype=None)
    return models


GPU_TRUNKS = [random_trunk(1, 90, (5, 40, 1, 40, 17)), random_trunk(2, 3, (1, 17)), random_trunk(3, 1, (6, 6))]
GPU_TRUNKS += continued(GPU_TRUNKS[0], random_trunk(4, 40, (30, 7)), random_trunk(5, 20, (9,)))


def rewards(models: Sequence[TorchModel], options: ComputeOptions) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    scores = PairEngine(models[0], models[1], INFO, options).score(GPU_TRUNKS, Wants(kl=True))
    return np.concatenate([s.sft_logprob_S - s.reference_logprob_S for of_trunk in scores for s in of_trunk])


@pytest.mark.gpu
@pytest.mark.parametrize("name", PACKED_ARCHITECTURES)
def test_packed_on_a_gpu_is_padded_on_a_gpu_within_rounding(name: str) -> None:
    """float32 takes the materialised path, bfloat16 the kernels. Both round: each is held to float32 on the CPU."""
    exact = rewards(on("cpu", name, torch.float32), PADDED)
    np.testing.assert_allclose(rewards(on("cuda", name, torch.float32), PACKED), exact, atol=5e-3)
    rounding = {
        options.packed: float(np.median(np.abs(rewards(on("cuda", name, torch.bfloat16), options) - exact)))
        for options in (PACKED, PADDED)
    }
    assert rounding[True] < 1.5 * rounding[False] + 1e-3


@pytest.mark.gpu
def test_a_reference_on_another_device_gives_what_it_gives_on_the_sft_models() -> None:
    together = rewards(on("cuda", "llama", torch.float32), PACKED)
    apart = rewards(on("cuda", "llama", torch.float32, reference_device="cpu"), PACKED)
    np.testing.assert_allclose(apart, together, atol=5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_alone_on_a_gpu_a_sequence_has_the_same_scores_to_the_bit(dtype: torch.dtype) -> None:
    models = on("cuda", "llama", dtype)
    engine = PairEngine(models[0], models[1], INFO, ALONE)
    together = engine.score(GPU_TRUNKS, Wants())
    for trunk, of_trunk in zip(GPU_TRUNKS, together, strict=True):
        for branch, found in zip(trunk.branches, of_trunk, strict=True):
            (single,) = engine.score([Trunk(trunk.prompt_P, (branch,))], Wants())[0]
            assert single.sft_logprob_S.tobytes() == found.sft_logprob_S.tobytes()
            assert single.reference_logprob_S.tobytes() == found.reference_logprob_S.tobytes()


@pytest.mark.gpu
def test_launching_waits_for_nothing_and_collecting_gives_the_scores() -> None:
    models = on("cuda", "llama", torch.bfloat16)
    engine = PairEngine(models[0], models[1], INFO, PACKED)
    wants = Wants(kl=True, entropy=True)
    engine.score(GPU_TRUNKS, wants)  # what is compiled or allocated at first
    works = [engine.prepare(GPU_TRUNKS, wants) for _ in range(2)]
    assert all(isinstance(work, StagedWork) for work in works)
    torch.cuda.set_sync_debug_mode("error")
    try:
        collects = [launched(work) for work in works]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    first, second = (np.concatenate([s.sft_logprob_S for of in collect() for s in of]) for collect in collects)
    assert np.isfinite(first).all()
    assert np.array_equal(first, second)
