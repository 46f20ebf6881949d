"""What a chat template's source says about the messages that it takes, by the rules of vLLM's renderer."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser


@dataclass(frozen=True, slots=True)
class TemplateForm:
    """`parts`: content is a list of parts, because the template loops over it. `developer`: it knows this role."""

    parts: bool
    developer: bool


@lru_cache(maxsize=256)
def template_form(template: str) -> TemplateForm:
    """The form of a template. One that is no valid Jinja takes strings; rendering it reports what is wrong."""
    developer = any(f"{quote}developer{quote}" in template for quote in "'\"")
    try:
        tree = _ENVIRONMENT.parse(template)
    except (jinja2.TemplateError, RecursionError):
        return TemplateForm(parts=False, developer=developer)
    return TemplateForm(parts=_loops_over_content(tree), developer=developer)


class _Generation(Extension):
    """The block {% generation %} of transformers: what is inside is ordinary template text."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_ENVIRONMENT = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _Generation])


def _loops_over_content(tree: nodes.Template) -> bool:
    """Whether a loop runs over the content of a message, directly or as the argument of a macro."""
    messages = _message_names(tree)
    in_macros = {id(loop) for macro in tree.find_all(nodes.Macro) for loop in macro.find_all(nodes.For)}
    for macro in tree.find_all(nodes.Macro):
        given = _parameters_with_content(tree, macro, messages)
        if any(_is_name(loop.iter, given) for loop in macro.find_all(nodes.For)):
            return True
    return any(
        _is_content(loop.iter, messages) or (id(loop) not in in_macros and _is_name(loop.iter, {"content"}))
        for loop in tree.find_all(nodes.For)
    )


def _message_names(tree: nodes.Template) -> set[str]:
    """The variables of loops over `messages`, or over a variable that was set to it or to a slice of it."""
    lists, found = {"messages"}, 0
    while found != len(lists):
        found = len(lists)
        for assigned in tree.find_all(nodes.Assign):
            if isinstance(assigned.target, nodes.Name) and _is_name(_unwrapped(assigned.node), lists):
                lists.add(assigned.target.name)
    loops = tree.find_all(nodes.For)
    return {o.target.name for o in loops if isinstance(o.target, nodes.Name) and _is_name(_unwrapped(o.iter), lists)}


def _parameters_with_content(tree: nodes.Template, macro: nodes.Macro, messages: set[str]) -> set[str]:
    """The parameters of a macro that are given the content of a message somewhere."""
    names = [argument.name for argument in macro.args]
    calls = [call for call in tree.find_all(nodes.Call) if _is_name(call.node, {macro.name})]
    by_place = (pair for call in calls for pair in zip(names, call.args, strict=False))
    by_name = ((argument.key, argument.value) for call in calls for argument in _keywords(call.kwargs))
    return {name for name, value in (*by_place, *by_name) if name in names and _is_content(value, messages)}


def _keywords(arguments: Sequence[nodes.Node]) -> Iterable[nodes.Keyword]:
    return (argument for argument in arguments if isinstance(argument, nodes.Keyword))


def _is_content(node: nodes.Node | None, messages: set[str]) -> bool:
    """message.content or message['content'], also filtered, tested or sliced."""
    node = _unwrapped(node)
    if isinstance(node, nodes.Getattr):
        return node.attr == "content" and _is_name(node.node, messages)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return node.arg.value == "content" and _is_name(node.node, messages)
    return False


def _unwrapped(node: nodes.Node | None) -> nodes.Node | None:
    """A value without filters, tests and slices around it."""
    while isinstance(node, nodes.Filter | nodes.Test) or (
        isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    ):
        node = node.node
    return node


def _is_name(node: nodes.Node | None, names: set[str]) -> bool:
    return isinstance(node, nodes.Name) and node.name in names
