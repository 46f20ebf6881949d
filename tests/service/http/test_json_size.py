"""The parts of a JSON body are counted before one object is made of them."""

import json

import pytest
from dense_reward.errors import RequestError
from dense_reward.http.json_size import MAX_KEYS, PART_BYTES, JsonSize, SizeLimits, check_size
from hypothesis import given
from hypothesis import strategies as some

MANY = SizeLimits(10**9, 10**9)
VALUES = some.recursive(
    some.none() | some.integers() | some.text() | some.floats(allow_nan=False),
    lambda inner: some.lists(inner) | some.dictionaries(some.text(), inner, max_size=20),
)


def counted(value: object) -> tuple[int, int]:
    """The values below this one and with it, and the lists and objects among them; a comma is not counted twice."""
    if not isinstance(value, list | dict):
        return 0, 0
    inside = list(value.values() if isinstance(value, dict) else value)
    below = [counted(one) for one in inside]
    commas = max(0, len(inside) - 1)
    return 1 + commas + sum(values for values, _ in below), 1 + sum(containers for _, containers in below)


@given(VALUES, some.booleans())
def test_every_value_is_counted_and_none_of_a_string(value: object, ascii_only: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode(errors="surrogatepass")
    assert check_size(body, MANY) == JsonSize(*counted(value))


@pytest.mark.parametrize("at", range(PART_BYTES - 4, PART_BYTES + 3))
@pytest.mark.parametrize("inside", [rb"\"", rb"\\", rb"\\\"", b"[{:,"])
def test_strings_and_escapes_go_on_in_the_next_part(at: int, inside: bytes) -> None:
    body = b'{"a":"' + b"x" * (at - 6) + inside + b'","b":[1,2]}'
    json.loads(body)
    assert check_size(body, MANY) == JsonSize(values=4, containers=2)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"[" + b"1," * 11 + b"1]", "more than 10 values (--max-body-bytes"),
        (b"[" + b"[]," * 3 + b"[]]", "more than 3 lists and objects"),
        (b"[" * 4, "more than 3 lists and objects"),
        (b"{" + b",".join(b'"%d":1' % n for n in range(MAX_KEYS + 1)) + b"}", "1024 keys"),
        (b'{"a":[{' + b",".join(b'"%d":1' % n for n in range(MAX_KEYS + 1)) + b"}]}", "1024 keys"),
    ],
)
def test_what_would_become_too_many_objects_is_refused(body: bytes, words: str) -> None:
    limits = MANY if "keys" in words else SizeLimits(10, 3)
    with pytest.raises(RequestError) as refused:
        check_size(body, limits)
    assert (refused.value.code, refused.value.status) == ("too_long", 422)
    assert words in str(refused.value)


def test_keys_are_counted_in_each_object_alone() -> None:
    keys = b",".join(b'"%d":1' % n for n in range(MAX_KEYS - 1))
    body = b'{"a":[' + b",".join([b"{" + keys + b"}"] * 3) + b"]," + keys + b"}"
    assert check_size(body, MANY).containers == 5


@pytest.mark.parametrize("body", [b"", b"]]]}", b'"', b'"abc', b"\\", b'{"a":\\"[', b":::", b"\xff\xfe"])
def test_what_is_not_json_is_left_to_the_parser(body: bytes) -> None:
    check_size(body, MANY)


def test_the_limits_grow_with_that_of_the_bytes() -> None:
    default, double = SizeLimits.of(4 * 1024 * 1024), SizeLimits.of(8 * 1024 * 1024)
    assert (default.values, default.containers) == (524_288, 65_536)
    assert (double.values, double.containers) == (2 * 524_288, 2 * 65_536)
    assert SizeLimits.of(100).containers >= 4096, "a request of --max-items small items"
