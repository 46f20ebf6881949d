"""What a pair computes of what it is given, and what it says where the device cannot."""

from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
import torch
from dense_reward.engine.base import Branch, TokenScores, Trunk, Wants
from dense_reward.engine.pair import PairEngine
from dense_reward.engine.torch_engine import TorchModel
from dense_reward.errors import EngineLostError, OutOfMemoryError
from tiny_models import LONG_TOKENS, random_trunk, tiny_model
from unruly_engines import INFO

TOLERANCE_NATS = 5e-5


def test_no_more_tokens_than_the_budget_are_computed_at_once_after_padding() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    shapes: list[tuple[int, int]] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    engine = PairEngine(TorchModel(model), TorchModel(model), INFO, max_batch_tokens=64)
    shapes.clear()
    engine.score([random_trunk(s, 5, tuple(range(s, 30, 3))) for s in range(3)] + [random_trunk(9, 70, (30,))], Wants())
    assert max(rows * length for rows, length in shapes if rows > 1) <= 64
    assert (1, 100) in shapes
    assert max(rows for rows, _ in shapes) > 4


def counted_engine() -> tuple[PairEngine, list[int]]:
    """An engine and the tokens, padding and all, of each forward of its sft model."""
    sft, reference = (TorchModel(tiny_model("llama", seed=seed, dtype=torch.float32)) for seed in (1, 2))
    counts: list[int] = []
    engine = PairEngine(sft, reference, INFO, max_batch_tokens=1000)
    sft._model.model.embed_tokens.register_forward_pre_hook(lambda _, args: counts.append(args[0].numel()))
    return engine, counts


def test_branches_without_a_scored_token_cost_nothing_and_get_empty_scores_of_the_right_shape() -> None:
    engine, counts = counted_engine()
    empty = random_trunk(0, 50, (0,) * 20, k=2)
    masked = Trunk(empty.prompt_P, (Branch(np.arange(9, dtype=np.int32), np.zeros(9, dtype=bool)),))
    answered = engine.score([empty, masked], Wants(kl=True, entropy=True, top_k=3))
    assert counts == []
    assert engine.cost_tokens(empty) == engine.cost_tokens(masked) == 0
    assert [len(branches) for branches in answered] == [20, 1]
    shapes = {f.name: getattr(answered[0][0], f.name).shape for f in fields(TokenScores)}
    assert {shapes.pop(f"top_{name}_SK") for name in ("ids", "sft_logprob", "reference_logprob")} == {(0, 3)}
    assert shapes.pop("candidate_reward_SK") == (0, 2)
    assert set(shapes.values()) == {(0,)}
    assert answered[1][0].candidate_reward_SK is None


def test_what_comes_after_the_last_scored_token_is_not_computed_and_changes_nothing() -> None:
    engine, counts = counted_engine()
    whole = random_trunk(0, 5, (30,))
    scored_T = np.zeros(30, dtype=bool)
    scored_T[[1, 3]] = True
    partly = Trunk(whole.prompt_P, (Branch(whole.branches[0].ids_T, scored_T),))
    found = engine.score([partly], Wants())[0][0]
    assert counts == [engine.cost_tokens(partly)] == [9]
    every = engine.score([whole], Wants())[0][0]
    np.testing.assert_allclose(found.sft_logprob_S, every.sft_logprob_S[[1, 3]], atol=TOLERANCE_NATS)


def test_the_cost_of_a_trunk_is_what_is_computed_before_padding() -> None:
    engine, counts = counted_engine()
    trunk = random_trunk(0, 40, (6, 6, 0, 6))
    engine.score([trunk], Wants())
    assert sum(counts) == engine.cost_tokens(trunk) == 3 * 46


def test_a_sequence_that_reaches_beyond_a_longrope_border_is_turned_as_a_long_one_where_only_its_start_is_scored() -> (
    None
):
    whole = random_trunk(0, 5, (LONG_TOKENS,))
    scored_T = np.arange(LONG_TOKENS) < 3
    partly = Trunk(whole.prompt_P, (Branch(whole.branches[0].ids_T, scored_T),))
    model = TorchModel(tiny_model("longrope", dtype=torch.float32))
    engine = PairEngine(model, model, INFO, max_batch_tokens=1000)
    found, every = (engine.score([trunk], Wants())[0][0] for trunk in (partly, whole))
    np.testing.assert_allclose(found.sft_logprob_S, every.sft_logprob_S[:3], atol=TOLERANCE_NATS)


def refuse_more_than(rows: int, error: Exception) -> Callable[[torch.nn.Module, tuple[torch.Tensor]], None]:
    def hook(_: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        if len(args[0]) > rows:
            raise error

    return hook


OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: out of memory: cannot allocate"),
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", ["model.embed_tokens", "lm_head"])
def test_memory_that_runs_out_in_the_model_or_its_head_is_told_as_such(error: Exception, place: str) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    engine = PairEngine(TorchModel(model), TorchModel(model), INFO, max_batch_tokens=1000)
    model.get_submodule(place).register_forward_pre_hook(refuse_more_than(2, error))
    with pytest.raises(OutOfMemoryError, match="allocate") as caught:
        engine.score([random_trunk(0, 3, (4, 4, 4))], Wants())
    assert caught.value.__context__ is None, "a traceback would keep the tensors of the batch alive"


def test_the_errors_of_torch_itself_for_want_of_memory_are_recognised() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    engine = PairEngine(TorchModel(model), TorchModel(model), INFO, max_batch_tokens=1000)
    model.lm_head.register_forward_pre_hook(lambda *_: torch.empty(1 << 60, dtype=torch.int8))
    with pytest.raises(OutOfMemoryError):
        engine.score([random_trunk(0, 3, (4, 4))], Wants())


@pytest.mark.parametrize(
    ("error", "told_as"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), EngineLostError),
        (RuntimeError("Triton: device-side assert triggered"), EngineLostError),
        (RuntimeError("shapes do not fit"), RuntimeError),
    ],
)
def test_a_device_that_is_lost_is_told_apart_from_a_call_that_failed(
    error: Exception, told_as: type[Exception]
) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    engine = PairEngine(TorchModel(model), TorchModel(model), INFO, max_batch_tokens=1000)
    model.lm_head.register_forward_pre_hook(refuse_more_than(0, error))
    with pytest.raises(told_as, match=str(error)):
        engine.score([random_trunk(0, 3, (4, 4))], Wants())
