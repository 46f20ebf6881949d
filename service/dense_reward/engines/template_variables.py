"""Which variables of a chat template a caller can set, from its source."""

import re

from jinja2 import Environment, TemplateError, nodes
from jinja2.meta import find_undeclared_variables

_GENERATION_TAG = re.compile(r"{%-?\+?\s*(end)?generation\s*-?\+?%}")
"""Tags of transformers' own that mark the assistant's text, and render nothing."""


def variables_of(template: str) -> frozenset[str]:
    """The variables that a template reads and does not set itself; none if it is no valid Jinja."""
    try:
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION_TAG.sub("", template))
        return frozenset(find_undeclared_variables(parsed)) - _set_inside(parsed)
    except (TemplateError, RecursionError):
        return frozenset()


def _set_inside(parsed: nodes.Template) -> set[str]:
    """Names that the template itself sets on some paths, and for which it never asks whether a caller has set them."""
    assigned = {name.name for name in parsed.find_all(nodes.Name) if name.ctx == "store"}
    asks: list[nodes.Expr | None] = [
        test.node for test in parsed.find_all(nodes.Test) if test.name in ("defined", "undefined", "none")
    ]
    asks += [filtered.node for filtered in parsed.find_all(nodes.Filter) if filtered.name in ("default", "d")]
    asked = {node.name for node in asks if isinstance(node, nodes.Name)}
    for branch in parsed.find_all(nodes.If):  # {% if not thinking %}{% set thinking = false %}: a default
        tested = {
            node.name for node in (branch.test, *branch.test.find_all(nodes.Name)) if isinstance(node, nodes.Name)
        }
        targets = [assign.target for assign in branch.find_all(nodes.Assign)]
        asked |= tested & {target.name for target in targets if isinstance(target, nodes.Name)}
    for assign in parsed.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name):
            asked |= {name.name for name in assign.node.find_all(nodes.Name)} & {assign.target.name}
    return assigned - asked
