"""Layers that two models have in common are computed once per batch, without changing a bit, or not at all."""

import copy
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from dense_reward.batching.deduplicate import ScoringTask, prepare_batch
from dense_reward.engines.torch.model import TorchModel
from dense_reward.engines.torch.pair import ComputeOptions, PairEngine
from dense_reward.engines.torch.shared_layers import (
    Link,
    computed_once,
    equal_layers,
    layers_computed_once,
    links_of,
)
from dense_reward.errors import OutOfMemoryError
from dense_reward.records import Scores
from faulty_engines import INFO
from shared_models import ALL, LAYERS, TRUNKS, assert_same_bits, changed, counted, decoder_layers, llama, upper
from tiny_configs import CONFIGS, PADDED, VOCABULARY, WINDOW_TOKENS
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, Gemma3nTextConfig, PreTrainedModel


def score(models: Sequence[TorchModel], options: ComputeOptions, shared: int) -> Scores:
    return PairEngine(models[0], models[1], INFO, options, shared_layers=shared).score(TRUNKS, ALL)


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_the_same_to_the_bit_in_every_architecture(name: str) -> None:
    one = tiny_model(name, seed=1, dtype=torch.float32)
    models = TorchModel(one), TorchModel(changed(one, [".1."]))
    for packed in {name not in PADDED, False}:
        options, reports = ComputeOptions(60, packed=packed), list[str]()
        assert layers_computed_once(models, reports.append, packed=packed) == 1
        assert reports == ["layer 0 of 2 equal in both models: computed once"]
        assert_same_bits(score(models, options, 1), score(models, options, 0))


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("packed", [True, False])
def test_only_the_layers_from_the_first_that_differs_are_computed_twice(packed: bool, alone: bool) -> None:
    one = llama()
    models = [TorchModel(one), TorchModel(changed(one, upper(2)))]
    options = ComputeOptions(1000, packed=packed, alone=alone)
    expected = score(models, options, 0)
    computed = counted(models)
    assert_same_bits(score(models, options, 2), expected)
    batches = computed[0, 0]
    assert computed == {(0, place): batches for place in range(4)} | {(1, place): batches for place in (2, 3)}


def test_a_trained_norm_and_output_layer_above_equal_layers_share_them_all() -> None:
    one = llama()
    models = TorchModel(one), TorchModel(changed(one, ["lm_head", "model.norm"]))
    assert layers_computed_once(models, lambda _: None, packed=True) == LAYERS
    assert_same_bits(score(models, ComputeOptions(1000), LAYERS), score(models, ComputeOptions(1000), 0))


NOTHING_EQUAL: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "the first layer": lambda model: changed(model, [".0."]),
    "the embedding": lambda model: changed(model, ["embed_tokens"]),
    "the dtype": lambda model: copy.deepcopy(model).to(torch.bfloat16),
    "an attribute of the configuration": lambda _: llama(rms_norm_eps=1e-3),
    "the number of layers": lambda _: llama(3),
}


@pytest.mark.parametrize("what", NOTHING_EQUAL)
def test_models_that_differ_below_their_layers_share_none(what: str) -> None:
    one, reports = llama(), list[str]()
    models = TorchModel(one), TorchModel(NOTHING_EQUAL[what](one))
    assert layers_computed_once(models, reports.append, packed=True) == 0
    assert reports == []


def test_a_model_on_another_device_shares_none() -> None:
    one = llama()
    models = TorchModel(one), TorchModel(changed(one, upper(2)))
    assert equal_layers(*models) == 2
    models[1].transformers_model.to("meta")
    assert equal_layers(*models) == 0


def test_where_a_checkpoint_is_and_who_wrote_it_does_not_matter() -> None:
    one = llama()
    other = changed(one, upper(3))
    other.config._name_or_path, other.config.transformers_version = "elsewhere", "0"
    assert equal_layers(TorchModel(one), TorchModel(other)) == 3


def gemma3n() -> PreTrainedModel:
    """Its upper layers use the keys and values of lower ones."""
    torch.manual_seed(1)
    config = Gemma3nTextConfig(
        vocab_size=VOCABULARY,
        vocab_size_per_layer_input=VOCABULARY,
        pad_token_id=0,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=[48] * LAYERS,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        laurel_rank=4,
        sliding_window=WINDOW_TOKENS,
        activation_sparsity_pattern=[0.0] * LAYERS,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def test_layers_that_hand_on_more_than_their_result_are_computed_in_each_model() -> None:
    one, reports = gemma3n(), list[str]()
    models = TorchModel(one), TorchModel(changed(one, upper(3)))
    assert layers_computed_once(models, reports.append, packed=False) == 0
    (line,) = reports
    assert line.startswith("layers 0 to 2 of 4 equal in both models, but computed in each of them: ")
    assert "KeyError" in line


class Remembering(torch.nn.Module):
    """A part of a layer that hands a number to another layer without returning it."""

    def __init__(self, memory: list[torch.Tensor], *, reads: bool) -> None:
        super().__init__()
        self._memory, self._reads = memory, reads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._reads:
            return x + self._memory.pop()
        self._memory.append(x.mean())
        return x


def test_a_wrong_result_is_noticed_and_not_served() -> None:
    """The first layer hands the last one a number that is in no result."""
    one = llama()
    other = changed(one, upper(2))
    for model in (one, other):
        memory: list[torch.Tensor] = [torch.zeros(())] * 9
        model.model.layers[0].mlp = torch.nn.Sequential(model.model.layers[0].mlp, Remembering(memory, reads=False))
        model.model.layers[3].mlp = torch.nn.Sequential(model.model.layers[3].mlp, Remembering(memory, reads=True))
    reports: list[str] = []
    assert layers_computed_once((TorchModel(one), TorchModel(other)), reports.append, packed=True) == 0
    assert reports == [
        "layers 0 to 1 of 4 equal in both models, but computed in each of them: their results alone do not determine "
        "the layers above"
    ]


@pytest.mark.parametrize("broken", [(0, 3), (1, 0), (1, 3)], ids=["giver", "below", "taker"])
def test_a_batch_that_fails_leaves_nothing_behind(broken: tuple[int, int]) -> None:
    one = llama()
    models = [TorchModel(one), TorchModel(changed(one, upper(2)))]
    engine = PairEngine(models[0], models[1], INFO, ComputeOptions(1000), shared_layers=2)
    expected = score(models, ComputeOptions(1000), 0)

    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")

    hook = decoder_layers(models[broken[0]])[broken[1]].register_forward_pre_hook(refuse)
    with pytest.raises(OutOfMemoryError):
        engine.score(TRUNKS, ALL)
    hook.remove()
    assert not any("forward" in vars(layer) for model in models for layer in decoder_layers(model))
    assert models[1].logprobs([1, 2], [3]) == TorchModel(copy.deepcopy(models[1].transformers_model)).logprobs(
        [1, 2], [3]
    )
    assert_same_bits(engine.score(TRUNKS, ALL), expected)


def test_a_forward_that_was_replaced_before_is_put_back() -> None:
    one = llama()
    models = [TorchModel(one), TorchModel(changed(one, upper(2)))]
    layer = decoder_layers(models[1])[0]
    layer.forward = own = layer.forward
    link = Link(models[0], models[1], 2)
    with computed_once([link]):
        assert layer.forward is not own
        models[0].logprobs([1], [2])
        assert link.kept
    assert layer.forward is own
    assert not link.kept


def test_a_model_whose_giver_did_not_call_its_layers_computes_its_own() -> None:
    """So it is when a CUDA graph replays the giver's row."""
    one = llama()
    models = [TorchModel(one), TorchModel(changed(one, upper(2)))]
    expected = models[1].logprobs([1, 2], [3, 4])
    with computed_once([Link(models[0], models[1], 2)]):
        assert models[1].logprobs([1, 2], [3, 4]) == expected


@pytest.mark.parametrize(
    ("relations", "expected"),
    [
        ([(0, 1, 3)], [(0, 1, 3)]),
        ([(1, 0, 3)], [(0, 1, 3)]),
        ([(0, 1, 0), (0, 0, 4)], []),
        ([(0, 1, 3), (0, 2, 1)], [(0, 1, 3), (0, 2, 1)]),
        ([(0, 1, 3), (2, 1, 2)], [(0, 1, 3), (0, 2, 2)]),
        ([(0, 1, 2), (1, 2, 3)], [(0, 1, 2), (1, 2, 3)]),
        ([(0, 2, 1), (1, 2, 3)], [(1, 2, 3)]),
        ([(0, 1, 4), (1, 2, 4), (2, 3, 4)], [(0, 1, 4), (0, 2, 4), (0, 3, 4)]),
    ],
    ids=["two", "turned", "none", "star", "through", "deeper", "deepest", "chain"],
)
def test_each_model_starts_from_one_that_computes_the_layers_itself(
    relations: list[tuple[int, int, int]], expected: list[tuple[int, int, int]]
) -> None:
    models = [TorchModel(llama(1)) for _ in range(4)]
    links = [(models.index(link.giver), models.index(link.taker), link.depth) for link in links_of(models, relations)]
    assert links == expected


def test_three_pairs_in_one_batch_compute_what_they_share_once() -> None:
    base = llama()
    models = [TorchModel(changed(base, upper(first), seed=first)) for first in (2, 3, 1)]
    models.append(TorchModel(changed(models[0].transformers_model, [".3."], seed=9)))
    pairs = [(0, 1), (0, 2), (3, 0)]
    depths = [layers_computed_once([models[a], models[b]], lambda _: None, packed=True) for a, b in pairs]
    assert depths == [2, 1, 3]
    made = [
        PairEngine(models[a], models[b], INFO, ComputeOptions(1000), shared_layers=depth)
        for (a, b), depth in zip(pairs, depths, strict=True)
    ]
    plain = [PairEngine(models[a], models[b], INFO, ComputeOptions(1000)) for a, b in pairs]
    expected = prepare_batch([ScoringTask(engine, trunk) for trunk in TRUNKS for engine in plain], ALL)()
    computed = counted(models)
    found = prepare_batch([ScoringTask(engine, trunk) for trunk in TRUNKS for engine in made], ALL)()
    assert_same_bits(found, expected)
    assert computed == Counter([(0, 0), (0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3), (3, 3)])


def test_a_batch_never_starts_from_another_batch() -> None:
    one = llama()
    models = [TorchModel(one), TorchModel(changed(one, upper(2)))]
    engine = PairEngine(models[0], models[1], INFO, ComputeOptions(1000), shared_layers=2)
    plain = PairEngine(models[0], models[1], INFO, ComputeOptions(1000))
    for trunk in TRUNKS + TRUNKS[::-1]:  # of one shape and other ids
        assert_same_bits(engine.score([trunk], ALL), plain.score([trunk], ALL))
