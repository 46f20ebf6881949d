"""The lowest layers that two served models have in common are computed once per batch.

If the configurations, everything below the decoder layers and the first `depth` layers are equal, the second model of a
batch starts from what the first returned after these layers. Nothing here knows an architecture: within one batch the
forwards of these layers are replaced, and at load an experiment proves that this changes no bit.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel

from dense_reward.batching.packing import pack
from dense_reward.engines.torch import attention
from dense_reward.engines.torch.memory import same_bits
from dense_reward.engines.torch.model import DeviceRow, TorchModel, device_row
from dense_reward.records import Branch, IdArray, Report, Trunk

Relation = tuple[int, int, int]
"""Two models, by their places in a batch, and how many of their lowest layers are equal."""
_ABOUT_FILES = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
"""Keys of a configuration that change nothing that is computed."""
_FAILURES = (RuntimeError, LookupError, AttributeError, TypeError, ValueError)


@dataclass(slots=True)
class Link:
    """`taker` starts from what `giver`, computed before it, returned after its first `depth` layers."""

    giver: TorchModel
    taker: TorchModel
    depth: int
    kept: list[object] = field(default_factory=list)
    used: bool = False


def links_of(models: Sequence[TorchModel], relations: Sequence[Relation]) -> list[Link]:
    """From which model each model starts: one that is computed before it and computes the layers itself."""
    found: dict[int, tuple[int, int]] = {}
    for one, other, depth in relations:
        giver, taker = sorted((one, other))
        if giver != taker and depth > found.get(taker, (0, 0))[1]:
            found[taker] = giver, depth
    for taker in sorted(found):
        giver, depth = found[taker]
        while found.get(giver, (0, 0))[1] >= depth:  # the giver skips these layers too: start from its own giver
            giver = found[giver][0]
        found[taker] = giver, depth
    return [Link(models[giver], models[taker], depth) for taker, (giver, depth) in found.items()]


@contextmanager
def computed_once(links: Sequence[Link]) -> Iterator[None]:
    """Within it, for one batch, takers skip their shared layers. Afterwards, also on errors, nothing of it remains.

    A taker whose giver did not call its layers, because a CUDA graph replayed them, computes its own.
    """
    with ExitStack() as stack:
        for link in links:
            stack.callback(link.kept.clear)
            top = _layers_of(link.giver)[link.depth - 1]
            stack.enter_context(_replaced(top, _kept(top.forward, link.kept)))
            for place, layer in enumerate(_layers_of(link.taker)[: link.depth]):
                last = place == link.depth - 1
                stack.enter_context(_replaced(layer, _taken(layer.forward, link, last=last)))
        yield


def layers_computed_once(models: Sequence[TorchModel], report: Report, *, packed: bool) -> int:
    """How many of the lowest layers of two models to compute once: those that are equal, if an experiment agrees."""
    depth = equal_layers(*models)
    if not depth:
        return 0
    which = "layer 0" if depth == 1 else f"layers 0 to {depth - 1}"
    layers = f"{which} of {len(_layers_of(models[0]))} equal in both models"
    reason = _refuted(links_of(models, [(0, 1, depth)]), packed=packed)
    report(f"{layers}: computed once" if reason is None else f"{layers}, but computed in each of them: {reason}")
    return depth if reason is None else 0


def equal_layers(one: TorchModel, other: TorchModel) -> int:
    """The number of lowest decoder layers up to which two models compute the same; 0 also if that is not known."""
    first, second = one.transformers_model, other.transformers_model
    name = _name_of_layers(first)
    alike = (type(first), one.device, one.dtype, one.fused) == (type(second), other.device, other.dtype, other.fused)
    configs = [_what_computes(model.config.to_dict()) for model in (first, second)]
    if one is other or name is None or not alike or configs[0] != configs[1]:
        return 0
    weights, others = first.state_dict(), second.state_dict()
    after = _called_after_the_first_layer(one, name)
    if weights.keys() != others.keys() or after is None:
        return 0
    unequal = {key for key, weight in weights.items() if not same_bits(weight, others[key])}
    in_layers = {key for key in unequal if key.startswith(f"{name}.")}
    if any(key.rpartition(".")[0] not in after for key in unequal - in_layers):
        return 0
    places = [int(key[len(name) + 1 :].partition(".")[0]) for key in in_layers]
    return min(places, default=len(_layers_of(one)))


def _what_computes(config: object) -> object:
    if not isinstance(config, dict):
        return config
    return {key: _what_computes(entry) for key, entry in config.items() if key not in _ABOUT_FILES}


def _name_of_layers(model: PreTrainedModel) -> str | None:
    """The name of the outermost list with as many modules as the model has layers."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = ((name, each) for name, each in model.named_modules() if isinstance(each, nn.ModuleList))
    return next((name for name, each in lists if len(each) == count), None)


def _layers_of(model: TorchModel) -> list[nn.Module]:
    name = _name_of_layers(model.transformers_model)
    return [] if name is None else list(model.transformers_model.get_submodule(name).children())


def _called_after_the_first_layer(model: TorchModel, layers: str) -> set[str] | None:
    """The modules, by name, that a forward calls only after the first layer: final norm, output layer. None: unknown.

    All others, also those that are not called, count as being below the layers: their weights may be used directly.
    """
    called: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, module in model.transformers_model.named_modules()
    ]
    try:
        model.padded_rows([np.arange(3, dtype=np.int32)], [np.arange(3, dtype=np.int32)])
    finally:
        for hook in hooks:
            hook.remove()
    first = f"{layers}.0"
    if first not in called:
        return None
    at = called.index(first)
    return {*called[at:]} - {*called[:at]}


def _refuted(links: Sequence[Link], *, packed: bool) -> str | None:
    """Why layers cannot be computed once: the rows of a short batch differ from those of whole forwards, or it fails.

    So it is where a layer hands more to a later one than its result: keys and values, a state, inputs of each layer.
    """
    models = [links[0].giver, links[0].taker]
    apart = [_rows(model, packed=packed) for model in models]
    try:
        with computed_once(links):
            once = [_rows(model, packed=packed) for model in models]
            used = all(link.used for link in links)
    except _FAILURES as error:
        return f"without the layers, the forward fails ({type(error).__name__}: {' '.join(str(error).split())})"
    if not used:
        return "a forward does not call them"
    equal = all(same_bits(*pair) for pair in zip(apart, once, strict=True))
    return None if equal else "their results alone do not determine the layers above"


def _rows(model: TorchModel, *, packed: bool) -> Tensor:
    """The inputs of the output layer of a prompt with three responses, launched and not replayed."""
    random = np.random.default_rng(0)

    def ids(count: int) -> IdArray:
        return random.integers(0, model.vocab_size, count).astype(np.int32)

    trunk = Trunk(ids(5), tuple(Branch(ids(n), np.ones(n, dtype=bool)) for n in (3, 9, 3)))
    if not packed:
        whole = [np.concatenate([trunk.prompt_P, branch.ids_T]) for branch in trunk.branches]
        return model.padded_rows(whole, [np.arange(len(sequence), dtype=np.int32) for sequence in whole])
    row = device_row(next(iter(pack([trunk], max_tokens=1 << 20))), model.device)
    plan = attention.RowPlan(row.plan.trees, None)  # CUDA graphs need its second part
    return model.packed_rows(DeviceRow(row.ids_1N, row.positions_1N, row.rows_R, plan))


def _kept(forward: Callable[..., object], kept: list[object]) -> Callable[..., object]:
    def keep(*args: object, **kwargs: object) -> object:
        found = forward(*args, **kwargs)
        kept[:] = [_copied(found)]  # a copy, because a model may add to it in place
        return found

    return keep


def _taken(forward: Callable[..., object], link: Link, *, last: bool) -> Callable[..., object]:
    def take(*args: object, **kwargs: object) -> object:
        if not link.kept:
            return forward(*args, **kwargs)
        if not last:
            return link.kept[0]  # ignored by the next of these layers
        link.used = True
        return link.kept.pop()  # from here on the taker's own, and freed by it

    return take


def _copied(found: object) -> object:
    """A layer's result with its hidden states copied: a tensor, or a tuple that begins with it."""
    if isinstance(found, tuple):
        return (_copied(found[0]), *found[1:])
    return found.clone() if isinstance(found, Tensor) else found


@contextmanager
def _replaced(layer: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    before = vars(layer).get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        if before is None:
            del layer.forward
        else:
            layer.forward = before
