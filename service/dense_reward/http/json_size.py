"""How many objects a JSON body becomes, counted before one of them is made. Pure.

The parser makes all objects in one call, during which no other thread runs: 60 MB of tiny objects take 15 seconds and
gigabytes. This counts in short calls, and the counts bound that one call to about 50 ms.
"""

import re
from dataclasses import dataclass

from dense_reward.errors import refuse

PART_BYTES = 65_536
BYTES_PER_VALUE, MIN_VALUES = 8, 65_536
"""A body of the most bytes may have a value for each 8 of them, such as a token id. MIN_VALUES are always allowed."""
BYTES_PER_CONTAINER, MIN_CONTAINERS = 64, 8_192
"""The same for lists and objects, each of which costs as much as ten numbers."""
MAX_KEYS = 1_024
"""Limit on the keys of one object: each unknown key becomes a message."""
_ESCAPE = re.compile(rb"\\.", re.DOTALL)
_NOT_STRUCTURE = bytes(set(range(256)) - set(b"[]{}:,"))


@dataclass(frozen=True, slots=True)
class JsonSize:
    """Upper bounds for the parts of a body that a parser can reach: `values` counts lists and objects too."""

    values: int
    containers: int


@dataclass(frozen=True, slots=True)
class SizeLimits:
    """Limits on the values, and on the lists and objects, of a body."""

    values: int
    containers: int

    @classmethod
    def of(cls, max_body_bytes: int) -> "SizeLimits":
        return cls(
            max(MIN_VALUES, max_body_bytes // BYTES_PER_VALUE),
            max(MIN_CONTAINERS, max_body_bytes // BYTES_PER_CONTAINER),
        )


def check_size(body: bytes, limits: SizeLimits) -> JsonSize:
    """The size of a body. Raises RequestError(too_long) at the first limit that it exceeds.

    What is not JSON is counted as well as possible up to the first wrong byte, where a parser stops.
    """
    values = containers = 0
    keys: list[int] = []  # of each list and object that is open
    is_in_string, rest = False, b""
    for at in range(0, len(body), PART_BYTES):
        part = _ESCAPE.sub(b"", rest + body[at : at + PART_BYTES])
        rest = b"\\" if part.endswith(b"\\") else b""  # the first half of an escape
        texts = part.split(b'"')  # alternately outside of strings and inside
        outside = b"".join(texts[is_in_string::2])
        is_in_string ^= len(texts) % 2 == 0
        structure = outside.translate(None, _NOT_STRUCTURE)
        containers += structure.count(b"[") + structure.count(b"{")
        values += structure.count(b",") + structure.count(b"[") + structure.count(b"{")
        if values > limits.values:
            raise _too_many("values", limits.values)
        if containers > limits.containers:
            raise _too_many("lists and objects", limits.containers)
        _count_keys(structure.replace(b",", b""), keys)
    return JsonSize(values, containers)


def _count_keys(structure: bytes, keys: list[int]) -> None:
    """Continue `keys` with the brackets and colons of a part. Raises RequestError(too_long)."""
    for sign in structure:
        if sign == 58:  # a colon
            if keys:
                keys[-1] += 1
                if keys[-1] > MAX_KEYS:
                    raise refuse("too_long", f"an object of the body has more than {MAX_KEYS} keys: remove some")
        elif sign in b"[{":
            keys.append(0)
        elif keys:
            keys.pop()


def _too_many(what: str, limit: int) -> Exception:
    message = f"the body has more than {limit} {what} (--max-body-bytes sets this limit too): send the items in parts"
    return refuse("too_long", message)
