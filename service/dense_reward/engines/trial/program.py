"""The process of a trial: renders templates, matches patterns and tokenises, as the libraries would, within limits.

A program of its own, not a part of the package: it imports only what it needs, so that it starts in a tenth of a
second. It reads a JSON object from its input. It is killed if it takes too much time, and runs out of memory by itself.
"""

import json
import os
import re
import resource
import signal
import sys
from contextlib import suppress
from itertools import product

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = dict[str, object]
CHATS: tuple[list[Message], ...] = (
    [{"role": "user", "content": "Name a river."}],
    [{"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "The Rhine."}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a river."}],
    [{"role": role, "content": "Name a river."} for role in ("user", "assistant", "user", "assistant")],
    [{"role": "user", "content": [{"type": "text", "text": "Name a river."}]}],
    [{"role": role, "content": "Name a river."} for role in ("user", "assistant") * 100],
)
TOOLS = [{"type": "function", "function": {"name": "find", "description": "Finds.", "parameters": {"type": "object"}}}]


class Generation(Extension):
    """The block {% generation %} of transformers: what is inside is ordinary template text."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def limit(cpu_s: float, memory_bytes: int) -> None:
    """Bound this process from now on, and let others go first."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)  # its signal ends a process wherever it is
    with suppress(ValueError, OSError):  # not every system can
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(10)


def render(template: str, at_most: int) -> None:
    """Render short chats; MemoryError if one becomes longer than `at_most` characters. Other errors are not ours."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **_: json.dumps(value)
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": str}
    compiled = _compiled(environment, template)
    if compiled is None:
        return
    for chat, asks, tools in product(CHATS, (False, True), (None, TOOLS)):
        try:
            rendered = compiled.render(
                messages=chat, tools=tools, add_generation_prompt=asks, bos_token="", eos_token=""
            )
        except MemoryError:
            raise
        except Exception:
            continue
        if len(rendered) > at_most:
            raise MemoryError


def _compiled(environment: ImmutableSandboxedEnvironment, template: str) -> jinja2.Template | None:
    """None for an error of the template. Constants are computed already here."""
    try:
        return environment.from_string(template)
    except MemoryError:
        raise
    except Exception:
        return None


def match(patterns: list[str], names: list[str]) -> None:
    """Match each pattern with each name. Broken patterns are not ours."""
    for pattern in patterns:
        try:
            compiled = re.compile(pattern)
        except (re.error, RecursionError, OverflowError):
            continue
        for name in names:
            compiled.fullmatch(name)


def tokenize(path: str, texts: list[str], *, largest_id: int, per_character: int) -> None:
    """Read a tokenizer and encode texts; MemoryError if one becomes far too many tokens. Other errors are not ours."""
    from tokenizers import Tokenizer  # noqa: PLC0415 - only here

    try:
        with open(path, "rb") as file:
            vocabulary = json.load(file)["model"]["vocab"]
        if isinstance(vocabulary, dict) and max(vocabulary.values(), default=0) > largest_id:
            return  # refused in words before it is read
        tokenizer = Tokenizer.from_file(path)
        tokenizer.no_truncation()
    except MemoryError:
        raise
    except BaseException:  # a panic of the library is no Exception
        return
    for text in texts:
        try:
            encoding = tokenizer.encode(text, add_special_tokens=False)
        except MemoryError:
            raise
        except BaseException:
            continue
        if len(encoding.ids) > per_character * len(text):
            raise MemoryError


def main() -> int:
    """Returns exit code 0 if all of it ended within the limits, 3 if memory was short."""
    task = json.load(sys.stdin)
    limit(task["cpu_s"], task["memory_bytes"])
    try:
        for template in task["templates"]:
            render(template, task["characters"])
        match(task["patterns"], task["names"])
        if task["tokenizer"] is not None:
            tokenize(**task["tokenizer"])
    except MemoryError:
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
