"""What adoption found out about a checkpoint, as lines for the user."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dense_reward.checkpoints.probe import ProbedModel
from dense_reward.checkpoints.turn_ends import GENERATION_CONFIG, turn_ends
from dense_reward.engines.token_head.engine import HeadModel
from dense_reward.engines.tokenizer import TransformersTokenizer
from dense_reward.engines.torch.model import DTYPES
from dense_reward.engines.torch.packing_check import unsupported_reason
from dense_reward.engines.weight_files import ADAPTER_CONFIG, read_json
from dense_reward.heatmap.example import ExampleTokens
from dense_reward.manifest import Manifest
from dense_reward.text.encode import Encoder
from dense_reward.text.template import USERS

EXAMPLE = (USERS[0], "It is Oslo.")
"""A prompt and a response to show."""


@dataclass(frozen=True, slots=True, eq=False)
class Checked:
    """A checkpoint that can be adopted.

    `files`, `base`: the folders of its files and of an adapter's base model. `model`: in float32, on the device that
    has measured the probe.
    """

    files: Path
    base: Path | None
    manifest: Manifest
    model: ProbedModel
    tokenizer: TransformersTokenizer
    encoder: Encoder

    @property
    def named_end(self) -> str | None:
        """The end of turn as text, if only the user's choice names it."""
        end = self.encoder.end_of_turn_id
        if end is None or self.encoder.renderer != "chat":
            return None
        ends = turn_ends(self.encoder, self.base or self.files)
        return None if ends.agree and ends.template_id == end else self.tokenizer.pieces([end])[0]


def findings(found: Checked) -> Iterator[str]:
    """Model, tokenizer and chat template, each as `name: value`; an undecided template takes several lines."""
    yield from _model(found)
    yield from _template(found)
    yield f"end of turn: {_end_of_turn(found)}"


def example_of(found: Checked) -> ExampleTokens | None:
    """The tokens of an example chat; None if it is undecided what precedes a response."""
    encoder = found.encoder
    if encoder.undecided("flags") is not None:
        return None
    pieces = found.tokenizer.pieces
    prompt, response = encoder.prompt(EXAMPLE[0]), encoder.response(EXAMPLE[1], add_eos=False)
    end = () if encoder.end_of_turn_id is None else (encoder.end_of_turn_id,)
    return ExampleTokens(
        tuple(pieces([*map(int, prompt)])), tuple(pieces([*map(int, response.ids_T)])), tuple(pieces(end))
    )


def _model(found: Checked) -> Iterator[str]:
    model = found.model.transformers_model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    yield f"architecture: {type(model).__name__}, {parameters:,} parameters"
    if found.base is not None:
        named = found.manifest.adapter_base
        yield f"adapter: {_adapter(found.files)}; base model: {found.base} (in the manifest: {named})"
    yield f"dtype: {found.manifest.dtype}"
    dtype = DTYPES.get(found.manifest.dtype, torch.float32)
    if isinstance(found.model, HeadModel):
        yield "path: padded, as all token heads"
    else:
        reason = unsupported_reason(model, device=str(found.model.device), dtype=dtype)
        yield "path: packed" if reason is None else f"path: padded, several times slower, because {reason}"
    yield f"longest sequence: {found.model.max_length_tokens:,} tokens"
    yield f"vocabulary: {found.model.vocab_size:,} output rows, {found.tokenizer.vocab_size:,} ids in the tokenizer"


def _adapter(files: Path) -> str:
    config = read_json(files / ADAPTER_CONFIG)
    kind = "DoRA" if config.get("use_dora") else {"LORA": "LoRA"}.get(str(config.get("peft_type")), "of another kind")
    return f"{kind}, rank {config['r']}" if "r" in config else kind


def _template(found: Checked) -> Iterator[str]:
    encoder = found.encoder
    if encoder.renderer != "chat":
        unused = ", though the tokenizer has one" if found.tokenizer.has_chat_template else ""
        yield f"chat template: not used{unused}, because the renderer is {encoder.renderer}; texts are served"
        return
    undecided = encoder.undecided("flags")
    if undecided is not None:
        yield f"chat template: needs a decision; texts and chats will be refused until this is decided: {undecided}"
    elif encoder.chat.place().agrees:
        yield "chat template: texts are served; prompt, response and end of turn have the ids of its own rendering"
    else:
        yield "chat template: texts are served; response_prefix decides what precedes a response"
    yield f"template variables: {', '.join(_variables(found)) or 'none'}"
    if encoder.choices.template_date is not None:
        yield f"date: the chat template always writes {encoder.choices.template_date} (template_date)"


def _variables(found: Checked) -> Iterator[str]:
    """The variables that the template reads, each with its value in the manifest."""
    given = found.encoder.choices.template_kwargs
    for name in sorted(found.tokenizer.template_variables):
        yield f"{name}={json.dumps(given[name], ensure_ascii=False)}" if name in given else f"{name} (not set)"


def _end_of_turn(found: Checked) -> str:
    """The token and the sources that name it."""
    encoder, end = found.encoder, found.encoder.end_of_turn_id
    if end is None:
        return "none; a response ends with its text"
    token = f"{found.tokenizer.pieces([end])[0]!r}"
    ends = turn_ends(encoder, found.base or found.files) if encoder.renderer == "chat" else None
    sources = {
        "the chat template": ends is not None and ends.template_id == end,
        "the tokenizer": found.tokenizer.eos_id == end,
        GENERATION_CONFIG: ends is not None and end in ends.generation_ids,
    }
    return f"{token}, named by {', '.join(name for name, says in sources.items() if says) or '--end-of-turn'}"
