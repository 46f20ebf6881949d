"""The corpus of hostile bodies: each makes a service do, hold or build far more than its bytes suggest.

Bodies of megabytes are just below the service's default limits where they can be: what is above them is refused early.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

LIMIT_BYTES = 4 * 1024 * 1024
"""The default of --max-body-bytes."""
BELOW = LIMIT_BYTES - 1024
MOST_TEXT = 128 * 16_384
"""Bytes of text above which it is refused unread: the default length of a sequence, in the longest tokens."""
SCORE, HEATMAP, GET_REWARD, COMPLETIONS, SGLANG = "/score", "/heatmap", "/get_reward", "/v1/completions", "/generate"


@dataclass(frozen=True, slots=True)
class HostileBody:
    """A body and how it is sent. `chunk_bytes`: in chunks of this size, instead of with its length."""

    name: str
    make: Callable[[], bytes]
    path: str = SCORE
    compressed: bool = False
    chunk_bytes: int | None = None

    def bytes_of_request(self) -> bytes:
        """The whole request, with its head."""
        body = self.make()
        if self.compressed and not body.startswith(b"\x1f\x8b"):
            body = gzip.compress(body, 9, mtime=0)
        lines = [f"POST {self.path} HTTP/1.1", "Host: a", "Content-Type: application/json", "Connection: close"]
        lines += ["Content-Encoding: gzip"] * self.compressed
        if self.chunk_bytes is None:
            lines.append(f"Content-Length: {len(body)}")
        else:
            lines.append("Transfer-Encoding: chunked")
            parts = [body[at : at + self.chunk_bytes] for at in range(0, len(body), self.chunk_bytes)]
            body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
        return "\r\n".join([*lines, "", ""]).encode() + body


def filled(before: bytes, part: bytes, after: bytes, size: int = BELOW) -> Callable[[], bytes]:
    """JSON of about `size` bytes: `part` again and again between the two, without its last byte, a comma."""
    return lambda: before + (part * ((size - len(before) - len(after)) // len(part)))[:-1] + after


def encoded(content: object) -> Callable[[], bytes]:
    return lambda: json.dumps(content, separators=(",", ":")).encode()


def text(part: bytes, before: bytes = b'{"text":"', after: bytes = b'"}', size: int = BELOW) -> Callable[[], bytes]:
    """JSON of about `size` bytes with one long string."""
    return lambda: before + part * ((size - len(before) - len(after)) // len(part)) + after


def chat(turns: int, said: str, more: list[dict[str, object]] | None = None, **options: object) -> Callable[[], bytes]:
    """A chat of `turns` turns, after other messages; every turn is scored."""
    turn: list[dict[str, object]] = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
    return encoded({"messages": [*(more or []), *turn * turns], "score": "all_assistant", **options})


def deep_arguments() -> bytes:
    arguments = '{"a":' * 100_000 + "1" + "}" * 100_000
    call = {"function": {"name": "f", "arguments": arguments}}
    return json.dumps({"messages": [{"role": "assistant", "tool_calls": [call]}]}).encode()


def zeros(megabytes: int) -> Callable[[], bytes]:
    """Gzip of so many megabytes of blanks, made without holding them."""

    def make() -> bytes:
        packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
        return b"".join(packer.compress(b" " * 1_000_000) for _ in range(megabytes)) + packer.flush()

    return make


def corpus() -> list[HostileBody]:
    return [*_many_objects(), *_texts(), *_chats(), *_encodings(), *_other_routes()]


def _many_objects() -> Iterator[HostileBody]:
    message, key = b'{"role":"x","content":""},', b'"k%07d":1,'
    yield HostileBody("2.4 M messages", filled(b'{"messages":[', message, b"]}", 62_000_000))
    yield HostileBody("2.4 M messages, gzip", filled(b'{"messages":[', message, b"]}", 62_000_000), compressed=True)
    yield HostileBody("messages to the limit", filled(b'{"messages":[', message, b"]}"))
    yield HostileBody("messages to the limit, gzip", filled(b'{"messages":[', message, b"]}"), compressed=True)
    yield HostileBody("4,096 messages", encoded({"messages": [{"role": "x", "content": ""}] * 4096}))
    yield HostileBody("empty messages", filled(b'{"messages":[', b"{},", b"]}"))
    yield HostileBody("31 M numbers in an unknown key", filled(b'{"x":[', b"1,", b"]}", 62_000_000))
    yield HostileBody("numbers in an unknown key", filled(b'{"x":[', b"1,", b"]}"))
    yield HostileBody("lists in an unknown key", filled(b'{"x":[', b"[],", b"]}"))
    yield HostileBody("1 M unknown keys", lambda: b"{" + b"".join(key % n for n in range(1_000_000))[:-1] + b"}")
    yield HostileBody("unknown keys to the limit", lambda: b"{" + b"".join(key % n for n in range(340_000))[:-1] + b"}")
    yield HostileBody("64 kB of unknown keys", lambda: b"{" + b"".join(key % n for n in range(5_300))[:-1] + b"}")
    yield HostileBody("one key many times", filled(b"{", b'"text":"a",', b"}"))
    yield HostileBody("a key of 4 MB", text(b"k", b'{"', b'":1}'))
    yield HostileBody("tools", filled(b'{"tools":[', b"{},", b'],"messages":[{"role":"user","content":"a"}]}'))
    yield HostileBody("20 M tools, gzip", filled(b'{"tools":[', b"{},", b"]}", 60_000_000), compressed=True)
    yield HostileBody(
        "template_kwargs", lambda: b'{"template_kwargs":{' + b"".join(key % n for n in range(340_000))[:-1] + b"}}"
    )
    yield HostileBody("lists in template_kwargs", filled(b'{"template_kwargs":{"a":[', b"[],", b"]}}"))
    yield HostileBody("one list of ids", filled(b'{"prompt_ids":[1],"response_ids":[[', b"1,", b"]]}"))
    yield HostileBody("one list of large ids", filled(b'{"prompt_ids":[1],"response_ids":[[', b"4000000,", b"]]}"))
    yield HostileBody("33 M ids", filled(b'{"prompt_ids":[', b"1,", b"]}", 66_000_000))
    yield HostileBody("empty responses", filled(b'{"prompt_ids":[1],"response_ids":[', b"[],", b"]}"))
    yield HostileBody("responses of one id", filled(b'{"prompt_ids":[1],"response_ids":[', b"[1],", b"]}"))
    yield HostileBody("4,096 responses", encoded({"prompt_ids": [1], "response_ids": [[2] * 120] * 4096}))
    yield HostileBody("floats", filled(b'{"prompt_ids":[', b"1.5,", b"]}"))
    yield HostileBody("numbers of 400 digits", filled(b'{"prompt_ids":[', b"9" * 400 + b",", b"]}"))
    yield HostileBody("1e999", filled(b'{"prompt_ids":[', b"1e999,", b"]}"))
    yield HostileBody("a stream", encoded({"token_ids": [1] * 250_000, "score_mask": [0] + [1] * 249_999}))
    yield HostileBody("candidates", filled(b'{"text":"a","candidate_ids":[[', b"[1,2],", b"]]}"))
    yield HostileBody("segments", filled(b'{"text":"a","segments":[[', b"[0,1],", b"]]}"))
    yield HostileBody("include", filled(b'{"text":"a","include":[', b'"kl",', b"]}"))
    yield HostileBody("empty items", filled(b'{"items":[', b"{},", b"]}"))
    yield HostileBody("items", filled(b'{"items":[', b'{"text":"a"},', b"]}"))
    yield HostileBody("1 M items", filled(b'{"items":[', b'{"text":"a"},', b"]}", 14_000_000))
    yield HostileBody("64 kB of items", filled(b'{"items":[', b'{"text":"a b"},', b"]}", 65_000))
    tiny = [{"prompt_ids": [at % 4_000 + 1], "response_ids": [[2, 3]]} for at in range(4_096)]
    yield HostileBody("4,096 items of ids", encoded({"items": tiny}))
    yield HostileBody("4,096 items, each bad", encoded({"items": [{"text": ""}] * 4096, "on_error": "per_item"}))
    yield HostileBody("strings", filled(b'{"prompt":"a","responses":[', b'"",', b"]}"))
    yield HostileBody("lists in lists", lambda: b'{"prompt_ids":' + b"[" * 2_000_000)
    yield HostileBody("objects in objects", lambda: b'{"a":' * 800_000)
    yield HostileBody("lists in lists of tools", lambda: b'{"tools":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}")


def _texts() -> Iterator[HostileBody]:
    for size, megabytes in ((BELOW, 4), (MOST_TEXT, 2)):
        yield HostileBody(f"{megabytes} MB of words", text(b"the quick brown fox, ", size=size))
        yield HostileBody(f"{megabytes} MB of digits", text(b"0123456789", size=size))
        yield HostileBody(f"{megabytes} MB of blanks", text(b" ", size=size))
        yield HostileBody(f"{megabytes} MB of special tokens", text(b"<|end|>", size=size))
    yield HostileBody("2 MB of one letter", text(b"a", size=MOST_TEXT))
    yield HostileBody("2 MB of raw special tokens", text(b"<|end|>", b'{"render":"raw","text":"', size=MOST_TEXT))
    yield HostileBody("2 MB of prompt", text(b"ab ", b'{"response":"a","prompt":"', size=MOST_TEXT))
    yield HostileBody("2 MB of combining signs", text("e\u0301\u0302\u0303".encode(), size=MOST_TEXT))
    yield HostileBody("4 MB of escapes", text(rb"\n"))
    yield HostileBody("4 MB of quotes", text(rb"\""))
    yield HostileBody("4 MB of escaped signs", text(rb"\u4e2d"))
    yield HostileBody("100 texts", encoded({"items": [{"text": "ab 12 " * 4_000}] * 100, "on_error": "per_item"}))
    yield HostileBody("model of 4 MB", text(b"m", b'{"text":"a","model":"'))
    yield HostileBody("revision of 4 MB", text(b"m", b'{"text":"a","expect_revision":"'))
    yield HostileBody("lone surrogates", text(rb"\ud800"))
    yield HostileBody("a wrong byte at the end", lambda: b'{"text":"' + b"a" * 4_000_000 + b'\xff"}')
    yield HostileBody("commas in a string", text(b",[{:"))


def _chats() -> Iterator[HostileBody]:
    unknown: list[dict[str, object]] = [{"role": "x", "content": ""}]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"a": "b " * 20_000}}}
    yield HostileBody("60,000 messages and 256 turns, gzip", chat(256, "a", unknown * 60_000), compressed=True)
    yield HostileBody("3,584 messages and 256 turns, gzip", chat(256, "a", unknown * 3_584), compressed=True)
    yield HostileBody("256 turns", chat(256, "one two three"))
    yield HostileBody("256 turns to the context", chat(256, "a b c d e f g h i j k l m "))
    yield HostileBody("256 turns with a long tool, gzip", chat(256, "a", tools=[tool]), compressed=True)
    yield HostileBody("1,000 tools", chat(8, "a", tools=[{"type": "function", "function": {"name": "f"}}] * 1_000))
    parts = filled(b'{"messages":[{"role":"user","content":[', b'{"type":"text","text":"a"},', b"]}]}")
    yield HostileBody("parts of a message", parts)
    calls = filled(b'{"messages":[{"role":"assistant","tool_calls":[', b'{"function":{"name":"f"}},', b"]}]}")
    yield HostileBody("tool calls", calls)
    yield HostileBody("deep arguments", deep_arguments)
    said = b'{"messages":[{"role":"user","content":"a"},{"role":"assistant",'
    yield HostileBody(
        "a thought of 2 MB", text(b"1 a", said + b'"content":"b","reasoning_content":"', b'"}]}', MOST_TEXT)
    )
    call = said + b'"tool_calls":[{"function":{"name":"f","arguments":{"a":"'
    yield HostileBody("a tool call of 2 MB", text(b"1 a", call, b'"}}}]}]}', MOST_TEXT))
    arguments = said + b'"tool_calls":[{"function":{"name":"f","arguments":"['
    yield HostileBody("arguments of 2 M numbers", text(b"1,", arguments, b'1]"}}]}]}'))
    yield HostileBody("arguments of long numbers", text(b"9" * 4_000 + b",", arguments, b'1]"}}]}]}'))


def _encodings() -> Iterator[HostileBody]:
    yield HostileBody("2 GB of blanks, gzip", zeros(2_000), compressed=True)
    yield HostileBody("4 MB of blanks, gzip", zeros(4), compressed=True)
    yield HostileBody("gzip in gzip", lambda: gzip.compress(zeros(100)(), mtime=0), compressed=True)
    yield HostileBody("many gzip members", lambda: gzip.compress(b" ", mtime=0) * 100_000, compressed=True)
    yield HostileBody("gzip cut off", lambda: zeros(4)()[:-5], compressed=True)
    small = encoded({"prompt_ids": [1], "response_ids": [[2] * 30_000]})
    yield HostileBody("chunks of one byte", small, chunk_bytes=1)
    yield HostileBody("4 MB in chunks of one byte", text(b"a"), chunk_bytes=1)


def _other_routes() -> Iterator[HostileBody]:
    ids = {"prompt_ids": [1] * 100, "response_ids": [[2] * 500] * 33}
    yield HostileBody("heatmap of 19,800 tokens", encoded(ids | {"format": "svg"}), HEATMAP)
    yield HostileBody("heatmap of too many tokens", encoded(ids | {"response_ids": [[2] * 500] * 200}), HEATMAP)
    yield HostileBody("260,000 alternatives", encoded(ids | {"response_ids": [[2] * 500] * 26, "top_k": 20}))
    yield HostileBody(
        "get_reward of many", lambda: b'{"query":[' + b'"",' * 600_000 + b'""],"prompts":[""]}', GET_REWARD
    )
    query = text(b"ab 1", b'{"prompts":["a"],"query":["', b'"]}', MOST_TEXT)
    yield HostileBody("get_reward of 2 MB", query, GET_REWARD)
    prompt = {"model": "default", "max_tokens": 1, "prompt_logprobs": 0, "temperature": 1.0}
    yield HostileBody("completions of one list", encoded(prompt | {"prompt": [1] * 500_000}), COMPLETIONS)
    yield HostileBody("completions of lists", encoded(prompt | {"prompt": [[1, 2]] * 50_000}), COMPLETIONS)
    lists = [[1, 2, 3]] * 4_096
    yield HostileBody(
        "likeliest ids of 4,096 lists", encoded(prompt | {"prompt": lists, "prompt_logprobs": 20}), COMPLETIONS
    )
    asked = {"return_logprob": True, "logprob_start_len": 0, "sampling_params": {"max_new_tokens": 0}}
    rows = {"input_ids": [1] * 30_000, "token_ids_logprob_positions": [[1, 2, 3]] * 30_000}
    yield HostileBody("generate with positions", encoded(asked | rows), SGLANG)
    yield HostileBody("generate of 4,096 lists", encoded(asked | {"input_ids": lists, "top_logprobs_num": 20}), SGLANG)
