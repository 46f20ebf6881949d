"""Checks single values of a row, and parses strict JSON. Must not import files, data sets, tokenizers or templates."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NoReturn

from dense_reward_trainer.data.records import LineError

_SURROGATE = re.compile("[\ud800-\udfff]")


def strict_json(text: str, name: str = "") -> object:
    """The value of a JSON text. Raises LineError for anything else, NaN and repeated keys included.

    `name`: what the text is, for the message, if it is not the whole line.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise LineError("not JSON", f"{name}: {error}" if name else str(error)) from error


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    counts = Counter(key for key, _ in pairs)
    repeated = [key for key, count in counts.items() if count > 1]
    if repeated:
        raise LineError("not JSON", f"an object has the same key twice: {quoted_keys(repeated)}")
    return dict(pairs)


def _refuse_constant(name: str) -> NoReturn:
    raise LineError("not JSON", f"{name} is not a JSON number")


def string(value: object, name: str) -> str:
    """The value, if it is a text that UTF-8 can hold; else raises LineError, which names it `name`."""
    if not isinstance(value, str):
        raise LineError("wrong type", f"{name} is {json_type(value)}, a string is needed")
    surrogate = _SURROGATE.search(value)
    if surrogate:
        found = f"U+{ord(surrogate.group()):04X} at character {surrogate.start() + 1}"
        raise LineError("lone surrogate", f"{name} has {found}, which no UTF-8 text can hold")
    return value


def is_empty(value: object) -> bool:
    """Whether a column holds nothing: null, or a text, a list or an object without content. 0 and false are content."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, list | tuple | dict) and not value)


def without_nulls(value: object) -> object:
    """A value of Arrow without the null entries of its objects: Arrow gives each the keys of all others."""
    if isinstance(value, Mapping):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list | tuple) else value


def texts_in(value: object) -> list[str]:
    """All texts and numbers in a value and in its lists and objects, as text. A single true or false is none."""
    if isinstance(value, bool) or value is None:
        return []
    if not isinstance(value, list | tuple | dict):
        return [str(value)]
    parts = value.values() if isinstance(value, dict) else value
    return [text for part in parts for text in ([str(part)] if isinstance(part, bool) else texts_in(part))]


def quoted_keys(keys: Iterable[object]) -> str:
    """The keys in order, quoted, for a message."""
    return ", ".join(ascii(key) for key in sorted(map(str, keys)))


def json_type(value: object) -> str:
    """JSON's word for the type of a value."""
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return "missing" if value is None else kinds.get(type(value), type(value).__name__)
