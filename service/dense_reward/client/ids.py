"""Ids as people have them -> ids as requests have them. Imports no tokenizer library and no torch.

Accepted where one meaning is possible: lists, arrays and tensors (on any device), flat lists for a single response,
what a tokenizer of transformers or tokenizers returns (padding is removed by its attention mask). Everything else
raises TypeError or ValueError that says what to pass.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Row = list[int] | NDArray[np.integer]
FORMS = (
    '{"prompt": ..., "response": ...}, {"prompt_ids": ..., "response_ids": ...}, {"messages": ...}, '
    '{"token_ids": ..., "score_mask": ...} or {"text": ...}'
)


@runtime_checkable
class _Encoding(Protocol):
    """tokenizers.Encoding."""

    @property
    def ids(self) -> Sequence[int]: ...
    @property
    def attention_mask(self) -> Sequence[int]: ...


@runtime_checkable
class _Tensor(Protocol):
    """torch.Tensor, on any device."""

    def detach(self) -> "_Tensor": ...
    def cpu(self) -> "_Tensor": ...


def item_of(item: object) -> dict[str, object]:
    """An item whose ids are lists or arrays. Raises TypeError or ValueError, with the cure, for everything else."""
    if not isinstance(item, Mapping):
        raise TypeError(f"an item must be a mapping such as {FORMS}; it is a {type(item).__name__}")
    if "input_ids" in item:
        raise TypeError(f"this item is the output of a tokenizer: pass it inside an item, one of {FORMS}")
    plain = dict(item)
    for name in ("prompt_ids", "token_ids"):
        if name in plain:
            plain[name] = one_row(plain[name], name)
    if "response_ids" in plain:
        plain["response_ids"] = rows(plain["response_ids"])
    for name in ("score_mask", "candidate_ids"):
        if name in plain:
            plain[name] = _on_cpu(plain[name])
    mask = plain.get("score_mask")
    if isinstance(mask, list) and mask and all(isinstance(kept, bool) for kept in mask):
        plain["score_mask"] = list(map(int, mask))
    return plain


def one_row(value: object, name: str) -> object:
    """The ids of one sequence. A batch of one sequence counts as this sequence."""
    _no_text(value, name)
    if isinstance(value, Mapping | _Encoding):
        found = _unpadded(value, name)
        if len(found) != 1:
            raise ValueError(f"{name} has {len(found)} sequences: an item has one; make an item of each")
        return found[0]
    value = _on_cpu(value)
    depth = _depth(value)
    if depth == 2 and isinstance(value, Sequence | np.ndarray) and len(value) == 1:
        return one_row(value[0], name)
    if depth > 1:
        raise ValueError(f"{name} has {depth} dimensions: it must be a flat list of ids; make an item of each sequence")
    return value


def rows(value: object) -> object:
    """The ids of each response. A flat list of ids is a single response."""
    _no_text(value, "response_ids")
    if isinstance(value, Mapping | _Encoding):
        return _unpadded(value, "response_ids")
    value = _on_cpu(value)
    if _depth(value) == 1 and isinstance(value, Sequence | np.ndarray) and len(value):
        return [value]
    if isinstance(value, Iterable):
        return [one_row(row, "response_ids") if isinstance(row, Mapping | _Encoding) else _on_cpu(row) for row in value]
    return value


def _unpadded(encoded: "Mapping[str, object] | _Encoding", name: str) -> list[Row]:
    """The sequences of a tokenizer's output, without the ids whose attention mask is 0."""
    if isinstance(encoded, _Encoding):
        ids, mask = encoded.ids, encoded.attention_mask
        return [[id_ for id_, kept in zip(ids, mask, strict=True) if kept]]
    if "input_ids" not in encoded:
        raise TypeError(f"{name} is a mapping without input_ids: pass ids, or the output of a tokenizer")
    sequences = _listed(encoded["input_ids"], name)
    if encoded.get("attention_mask") is None:
        if len(sequences) > 1:
            raise ValueError(
                f"{name} has {len(sequences)} sequences without attention_mask, so padding cannot be recognised: "
                "let the tokenizer return it, or pass lists of ids without padding"
            )
        return sequences
    masks = _listed(encoded["attention_mask"], name)
    if [len(row) for row in masks] != [len(row) for row in sequences]:
        raise ValueError(f"{name}: attention_mask has another shape than input_ids")
    if any(np.setdiff1d(mask, (0, 1)).size for mask in masks):
        raise ValueError(
            f"{name}: attention_mask holds other numbers than 0 and 1, as for packed sequences: pass the ids of each "
            "sequence as a list"
        )
    return [np.asarray(ids)[np.asarray(mask) == 1] for ids, mask in zip(sequences, masks, strict=True)]


def _listed(value: object, name: str) -> list[Row]:
    """[G][T] of [G][T] or [T]."""
    value = _on_cpu(value)
    if not isinstance(value, Sequence | np.ndarray):
        raise TypeError(f"{name}.input_ids must be a list or an array; it is a {type(value).__name__}")
    if _depth(value) <= 1 and not _is_empty_batch(value):
        return [np.asarray(value, dtype=np.int64 if not len(value) else None)]
    return [np.asarray(_on_cpu(row), dtype=np.int64 if not len(row) else None) for row in value]


def _is_empty_batch(value: object) -> bool:
    return isinstance(value, Sequence) and bool(value) and all(isinstance(row, Sequence) for row in value)


def _depth(value: object) -> int:
    """The number of dimensions, judged by the first entry. A tokenizer's output for one text has one."""
    if isinstance(value, np.ndarray):
        return value.ndim
    if isinstance(value, _Tensor):
        return np.asarray(_on_cpu(value)).ndim
    if isinstance(value, Mapping | _Encoding):
        return 1
    if isinstance(value, str) or not isinstance(value, Sequence):
        return 0
    return 1 + max((_depth(entry) for entry in value[:1]), default=0)


def _on_cpu(value: object) -> object:
    """A tensor as an array. Everything else is returned unchanged."""
    if not isinstance(value, _Tensor):
        return value
    try:
        return np.asarray(value.detach().cpu())
    except TypeError as error:  # numpy has no bfloat16
        raise TypeError(f"a tensor cannot be sent ({error}): ids and masks are integers; call .long() on it") from None


def _no_text(value: object, name: str) -> None:
    text_inside = isinstance(value, Sequence) and len(value) > 0 and isinstance(value[0], str | bytes)
    if isinstance(value, str | bytes) or text_inside:
        raise TypeError(f"{name} holds text, it must hold ids: for text use score(prompt=..., response=...)")
    inside = value[0] if isinstance(value, Sequence) and len(value) else None
    if isinstance(inside, Mapping) and "input_ids" not in inside:
        raise TypeError(f"{name} holds messages, it must hold ids: for a chat use score_messages(messages)")
