"""How much memory a training step needs on each device, and which options would need less. Pure arithmetic.

The estimate counts tensors: weights, gradients, both moments of AdamW, what the forward pass keeps for the backward
pass, and the tile of logits that trl computes at a time. It is for decoders of the usual kind (norm, attention, norm,
gated feed-forward); a mixture of experts counts the experts that a token uses.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

FLOAT32 = 4
BFLOAT16 = 2
TILE_TOKENS, TILE_VOCABULARY = 4096, 32768
"""The tile of logits of trl 1.16."""
QUANTISED_BYTES = 0.52
"""Bytes of a weight in doubly quantised NF4: 4 bits, and 0.13 bits of scales."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """Sizes of a decoder. `frozen`: its parameters that are not trained; `query`, `keys`: widths of all heads."""

    trained: int
    frozen: int
    layers: int
    hidden: int
    query: int
    keys: int
    intermediate: int
    vocabulary: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """What a step computes at a time. `tokens`: of all rows of a forward pass, padding included; `learnt`: in the loss.

    `sharing`: processes that share weights, gradients and moments; 1 under DDP. `replicas`: whether others compute the
    same model, so that DDP keeps a second copy of the gradients.
    """

    tokens: int
    learnt: int
    accumulation: int = 1
    bfloat16: bool = False
    checkpointing: bool = False
    frozen_bytes: float = FLOAT32
    sharing: int = 1
    replicas: bool = False
    cuda: bool = False


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on each device by part. `peak`: what lives at the same time in the widest moment of a step."""

    weights: int
    gradients: int
    moments: int
    activations: int
    logits: int
    peak: int

    def words(self) -> str:
        parts = {"weights": self.weights, "gradients": self.gradients, "AdamW": self.moments}
        parts |= {"activations": self.activations, "logits": self.logits}
        return ", ".join(f"{name} {in_words(size)}" for name, size in parts.items())


def estimate(model: ModelSizes, step: StepShape) -> MemoryEstimate:
    """The memory of a training step from the second on, when AdamW has its moments."""
    shared_weights = (FLOAT32 * model.trained + step.frozen_bytes * model.frozen) / step.sharing
    short_copies = _short_copies(model, step)
    gradients = FLOAT32 * model.trained / step.sharing * (2 if step.replicas and step.sharing == 1 else 1)
    moments = 2 * FLOAT32 * model.trained / step.sharing
    layer = step.tokens * _layer_bytes(model, step)
    input_of_layer = step.tokens * FLOAT32 * model.hidden  # all that a checkpointed layer keeps
    kept = model.layers * (input_of_layer if step.checkpointing else layer)
    outer = step.tokens * FLOAT32 * model.hidden * 4  # embedding, last norm and its output, their gradient
    logits = _logits_bytes(model, step)
    # Gradients of earlier forward passes are there during the forward pass of a later one; DDP keeps its copy always.
    early = gradients if step.accumulation > 1 or step.replicas else 0.0
    begins = kept + outer + logits + early  # the backward pass begins
    ends = gradients + outer + layer * 1.2 + (kept / model.layers)  # the backward pass reaches the first layer
    inside = kept + outer + layer * 1.2 + early if step.checkpointing else 0.0
    peak = shared_weights + short_copies + moments + max(begins, ends, inside)
    sizes = (shared_weights + short_copies, gradients, moments, kept + outer, logits, peak)
    return MemoryEstimate(*(int(size) for size in sizes))


def _short_copies(model: ModelSizes, step: StepShape) -> float:
    """bfloat16 copies of float32 weights: of all of them under autocast, of two layers at a time if they are shared."""
    if not step.bfloat16:
        # Layers that were gathered to compute them
        return 0.0 if step.sharing == 1 else 2 * FLOAT32 * (model.trained + model.frozen) / model.layers
    if step.sharing > 1:
        return 2 * BFLOAT16 * (model.trained + model.frozen) / model.layers
    return BFLOAT16 * model.trained


def _layer_bytes(model: ModelSizes, step: StepShape) -> int:
    """Bytes that one layer keeps for the backward pass, for each token.

    Norms and the residual stream are float32. Under autocast, inputs of linear layers, attention and feed-forward are
    bfloat16, and the output of a norm is there in both types.
    """
    short = BFLOAT16 if step.bfloat16 else FLOAT32
    norms = 2 * FLOAT32 * 3 * model.hidden + (2 * short * model.hidden if step.bfloat16 else 0)
    attention = short * (2 * model.query + 2 * model.keys)
    return norms + attention + short * 4 * model.intermediate


def _logits_bytes(model: ModelSizes, step: StepShape) -> float:
    """The tile of logits in the backward pass, and the float32 gradients of the output layer and of its input."""
    rows = min(step.learnt, TILE_TOKENS)
    short = BFLOAT16 if step.bfloat16 else FLOAT32
    if step.cuda:  # one kernel replaces the tile, which is always of the full width
        tile = rows * TILE_VOCABULARY * short
    else:  # without the kernel, each step of its formula makes a float32 copy
        tile = rows * min(model.vocabulary, TILE_VOCABULARY) * (short + 8 * FLOAT32)
    return tile + FLOAT32 * (step.learnt * model.hidden + model.vocabulary * model.hidden)


@dataclass(frozen=True, slots=True)
class Advice:
    """An option that lowers the memory of a run, and the estimate with it."""

    option: str
    needs: MemoryEstimate


def advice(model: ModelSizes, step: StepShape, rows: int, gpus: int) -> Iterator[Advice]:
    """Options in the order in which they cost least, each with those before it. `rows`: of a forward pass.

    `gpus`: of the run; 1 suggests sharing the model among several.
    """
    options: list[str] = []
    if not step.checkpointing:
        step = replace(step, checkpointing=True)
        options.append("gradient_checkpointing=true")
        yield Advice(" ".join(options), estimate(model, step))
    while rows > 1:
        smaller = rows // 2
        step = replace(
            step, tokens=step.tokens * smaller // rows, learnt=max(1, step.learnt * smaller // rows), accumulation=2
        )
        rows = smaller
        yield Advice(" ".join([*options, f"batch_size={rows} (more gradient_accumulation)"]), estimate(model, step))
    options += ["batch_size=1 (more gradient_accumulation)"]
    if step.sharing == 1:
        for count in [gpus] if gpus > 1 else [2, 4, 8, 16]:
            shared = replace(step, sharing=count, replicas=False)
            words = [*options, f"--launch {count} --strategy fsdp2"]
            yield Advice(" ".join(words), estimate(model, shared))
    if model.frozen == 0:
        adapters = replace(model, trained=model.trained // 100, frozen=model.trained)
        with_lora = replace(step, frozen_bytes=BFLOAT16 if step.bfloat16 else FLOAT32)
        yield Advice(" ".join([*options, "lora={r: 16}"]), estimate(adapters, with_lora))


def which_fits(candidates: Iterator[Advice], free: int) -> Advice | None:
    """The first option whose peak fits into `free` bytes."""
    return next((candidate for candidate in candidates if candidate.needs.peak <= free), None)


def in_words(size: float) -> str:
    """A number of bytes, such as 61 GB or 310 MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def sizes_of(values: Mapping[str, int], *, trained: int, frozen: int) -> ModelSizes:
    """Sizes from the numbers of a model's configuration (transformers' names), and its parameters."""
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    head_size = values.get("head_dim") or hidden // heads
    wide = values.get("intermediate_size") or 4 * hidden
    experts = values.get("num_experts_per_tok") or 0
    wide = max(wide, experts * (values.get("moe_intermediate_size") or wide)) if experts else wide
    return ModelSizes(
        trained=trained,
        frozen=frozen,
        layers=values["num_hidden_layers"],
        hidden=hidden,
        query=heads * head_size,
        keys=(values.get("num_key_value_heads") or heads) * head_size,
        intermediate=wide,
        vocabulary=values["vocab_size"],
    )
