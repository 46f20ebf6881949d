"""Feed-forward layers compute a limited number of rows at a time: only the memory changes, never the result."""

import pytest
import torch
from dense_reward.engines.torch.feedforward import bound_feedforward
from tiny_configs import CONFIGS
from tiny_models import tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

BOUNDED = ("llama", "qwen2", "gemma3", "mistral", "gpt-oss", "mixtral", "gpt2", "lfm2", "olmo2", "phi3")
IDS_1L = torch.arange(50)[None] % 256


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=IDS_1L, use_cache=False).logits
    return found


@pytest.mark.parametrize("rows", [1, 7, 49, 50, 4096])
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt-oss"])
def test_a_bound_changes_nothing_wherever_the_parts_end(name: str, rows: int) -> None:
    plain, bounded = tiny_model(name), tiny_model(name)
    bound_feedforward(bounded, rows)
    torch.testing.assert_close(logits(bounded), logits(plain), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_computes_the_same_with_a_bound(name: str) -> None:
    plain, bounded = tiny_model(name), tiny_model(name)
    bound_feedforward(bounded, 7)
    torch.testing.assert_close(logits(bounded), logits(plain), atol=1e-6, rtol=0)


def widest(model: PreTrainedModel) -> int:
    """Rows of the widest call of a linear layer within the feed-forward layers."""
    rows: list[int] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (".mlp." in name or ".feed_forward." in name):
            module.register_forward_pre_hook(lambda _, args: rows.append(args[0].numel() // args[0].shape[-1]))
    logits(model)
    return max(rows)


@pytest.mark.parametrize("name", [name for name in BOUNDED if name not in {"mixtral", "gpt-oss", "gpt2"}])
def test_no_wide_layer_sees_more_rows_than_the_bound(name: str) -> None:
    assert widest(tiny_model(name)) == 50
    bounded = tiny_model(name)
    bound_feedforward(bounded, 8)
    assert widest(bounded) == 8


class Layer(nn.Module):
    """A feed-forward layer that records the rows of each call. Most architectures name these layers `mlp`."""

    def __init__(self, answers_with_more: bool) -> None:
        super().__init__()
        self.rows: list[int] = []
        self._more = answers_with_more

    def forward(self, states: Tensor, factor: float = 1.0) -> object:
        self.rows.append(states.shape[1])
        return (states * factor, states.sum()) if self._more else states * factor


def bounded_layer(*, answers_with_more: bool = False) -> Layer:
    model = nn.Module()
    layer = model.mlp = Layer(answers_with_more)
    bound_feedforward(model, 4)
    return layer


def test_a_layer_gets_its_rows_in_parts() -> None:
    layer, states = bounded_layer(), torch.randn(1, 10, 3)
    assert torch.equal(layer(states), states)
    assert layer.rows == [4, 4, 2]


@pytest.mark.parametrize(
    ("shape", "arguments"), [((1, 4, 3), {}), ((2, 10, 3), {}), ((1, 10, 3), {"factor": 2.0})], ids=str
)
def test_few_rows_padded_batches_and_calls_with_more_arguments_go_through_at_once(
    shape: tuple[int, ...], arguments: dict[str, float]
) -> None:
    layer, states = bounded_layer(), torch.randn(shape)
    assert torch.equal(layer(states, **arguments), states * arguments.get("factor", 1.0))
    assert layer.rows == [shape[1]]


def test_an_answer_that_is_more_than_rows_is_that_of_one_call() -> None:
    layer, states = bounded_layer(answers_with_more=True), torch.randn(1, 10, 3)
    found, total = layer(states)
    assert torch.equal(found, states)
    assert torch.equal(total, states.sum())


def test_a_second_bound_leaves_the_first_and_no_weight_is_renamed() -> None:
    model = tiny_model("llama")
    names = list(model.state_dict())
    bound_feedforward(model, 8)
    forward = model.model.layers[0].mlp.forward
    bound_feedforward(model, 4)
    assert model.model.layers[0].mlp.forward is forward
    assert list(model.state_dict()) == names
