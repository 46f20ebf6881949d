"""Which models are packed: all that can be and no others. Each other model has a reason, which is reported."""

from collections.abc import Callable, Iterator
from copy import deepcopy

import pytest
import torch
from dense_reward.batching.prefix_trees import Stretch, Tree
from dense_reward.engines.torch import attention, packing_check
from dense_reward.engines.torch.attention import RowPlan
from dense_reward.engines.torch.packing_check import unsupported_reason
from tiny_configs import CONFIGS, PACKED, PADDED
from tiny_models import tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

pytestmark = pytest.mark.slow

Attention = Callable[..., tuple[Tensor, None]]
Break = Callable[[Attention], Attention]

REASONS = {
    "lfm2": "it has layers of type conv",
    "qwen3-next": "its attention cannot be replaced",
    "bloom": "its attention cannot be replaced",
    "mpt": "its attention cannot be replaced",
    "roberta": "packed, its log-probs differ by",
    "stablelm": "its attention cannot be replaced",
    "nemotron": "the model does not pass its forward's arguments to its attention",
}


@pytest.fixture
def broken() -> Iterator[Callable[[Break], None]]:
    """Replaces packed attention with a changed one until the end of the test."""
    patch = pytest.MonkeyPatch()
    yield lambda change: patch.setattr(attention, "packed_attention", change(attention.packed_attention))
    patch.undo()
    attention.register()


def with_proxy(patch: pytest.MonkeyPatch, change: Callable[[PreTrainedModel], object]) -> None:
    """Changes every proxy model of the experiment."""
    plain = packing_check.proxy_model

    def changed(config: PreTrainedConfig) -> PreTrainedModel:
        proxy = plain(config)
        change(proxy)
        return proxy

    patch.setattr(packing_check, "proxy_model", changed)


def reason(name: str = "llama") -> str:
    found = unsupported_reason(tiny_model(name, dtype=torch.float32))
    assert found is not None
    return found


@pytest.mark.parametrize("name", PACKED)
def test_nothing_is_in_the_way_of_a_model_that_can_be_packed(name: str) -> None:
    assert unsupported_reason(tiny_model(name, dtype=torch.bfloat16)) is None


@pytest.mark.parametrize("name", PADDED)
def test_a_model_that_cannot_be_packed_is_padded_for_a_reason_in_one_line(name: str) -> None:
    found = reason(name)
    assert found.startswith(REASONS[name])
    assert "\n" not in found


def test_a_model_is_asked_without_being_changed() -> None:
    model = tiny_model("gemma2", dtype=torch.bfloat16)
    config, state = deepcopy(model.config), deepcopy(model.state_dict())
    random = torch.get_rng_state()
    assert unsupported_reason(model) is None
    assert model.config.to_dict() == config.to_dict()
    assert model.config._attn_implementation == config._attn_implementation
    assert all(torch.equal(found, state[key]) for key, found in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


STATED: dict[str, tuple[str, dict[str, object]]] = {
    "bidirectional": ("its attention is not causal", {"is_causal": False}),
    "with an encoder": ("its attention is not causal", {"is_encoder_decoder": True}),
    "chunked": ("it has layers of type chunked_attention", {"layer_types": ["chunked_attention", "full_attention"]}),
    "of many kinds": ("it has layers of type a, b", {"layer_types": ["b", "a"]}),
}


@pytest.mark.parametrize("name", STATED)
def test_what_a_configuration_says_is_believed_without_an_experiment(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, entries = STATED[name]
    model = tiny_model("llama")
    for key, entry in entries.items():
        setattr(model.config, key, entry)
    monkeypatch.setattr(packing_check, "proxy_model", None)
    assert unsupported_reason(model) == expected


def test_a_state_that_the_class_admits_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(type(model), "_is_stateful", True)
    assert unsupported_reason(model) == "it carries a state from token to token"


def test_a_configuration_of_which_no_proxy_can_be_built_is_no_reason_to_fail() -> None:
    model = tiny_model("llama")
    model.config.hidden_act = "no such function"
    found = unsupported_reason(model)
    assert found is not None
    assert found.startswith("no small proxy model of it can be built (KeyError: ")


# One mistake each, as attention functions make them.


def _without(argument: str) -> Break:
    def change(ours: Attention) -> Attention:
        return lambda *args, **kwargs: ours(*args, **(kwargs | {argument: None}))

    return change


def _with_plan(change_plan: Callable[[RowPlan], RowPlan], calls_before: int = 0) -> Break:
    """Attention with another plan than the row's, after `calls_before` right calls."""

    def change(ours: Attention) -> Attention:
        calls = [0]

        def attend(*args: object, plan: RowPlan, **kwargs: object) -> tuple[Tensor, None]:
            calls[0] += 1
            return ours(*args, plan=change_plan(plan) if calls[0] > calls_before else plan, **kwargs)

        return attend

    return change


def _one_sequence(plan: RowPlan) -> RowPlan:
    """Every token attends to all that precede it in the row."""
    last = plan.trees[-1]
    end = last.start + last.tokens + sum(s.count * s.length for s in last.branches)
    return RowPlan((Tree(0, end, ()),), layers=plan.layers)


def _branches_see_siblings(plan: RowPlan) -> RowPlan:
    """All branches of one length become one long branch."""
    trees = tuple(
        Tree(t.start, t.tokens, tuple(Stretch(s.start, 1, s.count * s.length) for s in t.branches)) for t in plan.trees
    )
    return RowPlan(trees, layers=plan.layers)


def _no_numbers(ours: Attention) -> Attention:
    return lambda *args, **kwargs: (ours(*args, **kwargs)[0] * torch.nan, None)


MISTAKES: dict[str, tuple[str, Break]] = {
    "a window that is ignored": ("mistral", _without("sliding_window")),
    "a window that is ignored in some layers": ("gemma3", _without("sliding_window")),
    "a cap that is ignored": ("gemma2", _without("softcap")),
    "a sink that is ignored": ("gpt-oss", _without("s_aux")),
    "a scale that is ignored": ("granite", _without("scaling")),
    "everything before it in the row": ("llama", _with_plan(_one_sequence)),
    "siblings of the same length": ("llama", _with_plan(_branches_see_siblings)),
    "what is not a number": ("llama", _no_numbers),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_attention_with_a_mistake_is_refused(name: str, broken: Callable[[Break], None]) -> None:
    architecture, mistake = MISTAKES[name]
    broken(mistake)
    assert reason(architecture).startswith("packed, its log-probs differ by ")


def test_a_window_is_tried_however_long_it_is_and_a_kind_of_layer_however_late_it_comes(
    broken: Callable[[Break], None],
) -> None:
    config = deepcopy(CONFIGS["gemma3"])
    config.update({"sliding_window": 4096, "num_hidden_layers": 6})
    config.layer_types = ["full_attention"] * 5 + ["sliding_attention"]
    model = AutoModelForCausalLM.from_config(config)
    assert unsupported_reason(model) is None
    broken(_without("sliding_window"))
    found = unsupported_reason(model)
    assert found is not None
    assert found.startswith("packed, its log-probs differ by ")


def test_a_leak_that_the_first_forward_does_not_show_is_found(broken: Callable[[Break], None]) -> None:
    """The first forward calls attention twice, once per layer. After it, every token attends to all that precede it."""
    broken(_with_plan(_one_sequence, calls_before=2))
    assert reason().startswith("tokens of one response change another's log-probs by ")


def test_a_layer_that_never_calls_the_attention_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def own_way(proxy: PreTrainedModel) -> None:
        layer = proxy.model.layers[1].self_attn
        layer.config = deepcopy(layer.config)

    with_proxy(monkeypatch, own_way)
    assert reason() == "only layers [0] of 2 call the attention that replaces their own"


def _before_forward(model: PreTrainedModel, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Changes the arguments of a packed forward. Only a packed one has positions."""

    def hook(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, Tensor]) -> tuple[object, object]:
        if "position_ids" in kwargs:
            change(kwargs)
        return args, kwargs

    model.register_forward_pre_hook(hook, with_kwargs=True)


FORWARDS: dict[str, tuple[str, Callable[[dict[str, Tensor]], object]]] = {
    "that shifts positions": (
        "packed, its log-probs differ by ",
        lambda kwargs: kwargs.update(position_ids=kwargs["position_ids"] + 1),
    ),
    "that counts positions through the row": (
        "packed, its log-probs differ by ",
        lambda kwargs: kwargs.update(position_ids=torch.arange(kwargs["position_ids"].shape[1])[None]),
    ),
    "that loses the plan": (
        "the model does not pass its forward's arguments to its attention",
        lambda kwargs: kwargs.pop("plan"),
    ),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_a_forward_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, change = FORWARDS[name]
    with_proxy(monkeypatch, lambda proxy: _before_forward(proxy, change))
    assert reason("gpt2").startswith(expected)


def test_layers_that_make_a_mask_of_their_own_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def masked(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[object, object]:
        return args, kwargs | {"attention_mask": torch.zeros(1, 1, 1, 1)}

    with_proxy(
        monkeypatch,
        lambda proxy: proxy.model.layers[1].self_attn.register_forward_pre_hook(masked, with_kwargs=True),
    )
    assert reason() == "the model's attention needs its own mask or bias"


@pytest.mark.parametrize("name", PACKED)
def test_rounding_to_bfloat16_is_not_taken_for_a_wrong_kernel(name: str) -> None:
    assert unsupported_reason(tiny_model(name), device="cpu:0", dtype=torch.bfloat16) is None


def test_kernels_of_a_device_are_tried_in_their_dtype_and_those_that_are_wrong_are_refused(
    broken: Callable[[Break], None],
) -> None:
    """cpu:0 plays a device with other kernels than the CPU's, which the experiment has tested."""

    def wrong_if_short(ours: Attention) -> Attention:
        def attend(module: nn.Module, q: Tensor, *args: Tensor, **kwargs: object) -> tuple[Tensor, None]:
            out = ours(module, q, *args, **kwargs)[0]
            return (out.flip(-1) if q.dtype is torch.bfloat16 else out), None

        return attend

    broken(wrong_if_short)
    assert unsupported_reason(tiny_model("llama")) is None
    found = unsupported_reason(tiny_model("llama"), device="cpu:0", dtype=torch.bfloat16)
    assert found is not None
    assert found.startswith("the kernels of cpu are off by ")
