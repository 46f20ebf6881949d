"""Which content a chat template takes is read from its source."""

import pytest
from dense_reward.engines.template_form import TemplateForm, template_form
from tool_templates import TOOL_TEMPLATES

STRINGS = "{% for m in messages %}{{ m.content }}{% endfor %}"
PARTS = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
MACRO_ABC = "{% macro f(a, b, c) %}{% for p in b %}a{% endfor %}{% endmacro %}"


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        (STRINGS, False),
        (PARTS, True),
        ("{% for m in messages %}{% for p in m['content'] | list %}{{ p.text }}{% endfor %}{% endfor %}", True),
        ("{% set l = messages[1:] %}{% for m in l %}{% for p in m.content[1:] %}a{% endfor %}{% endfor %}", True),
        ("{% set l = a %}{% for m in l %}{% for p in m.content %}a{% endfor %}{% endfor %}", False),
        ("{% for t in tools %}{% for p in t.content %}a{% endfor %}{% endfor %}", False),
        ("{% for m in messages %}{% for p in m.tool_calls %}a{% endfor %}{% endfor %}", False),
        ("{% for m in messages %}{% set content = m.content %}{% for p in content %}a{% endfor %}{% endfor %}", True),
        ("{% for m in messages %}{% set c = m.content %}{% for p in c %}a{% endfor %}{% endfor %}", False),
        (MACRO_ABC + "{% for m in messages %}{{ f(1, m.content) }}{% endfor %}", True),
        (MACRO_ABC + "{% for m in messages %}{{ f(1, b=m.content) | trim }}{% endfor %}", True),
        (MACRO_ABC + "{% for m in messages %}{{ f(m.content, 1) }}{% endfor %}", False),
        (MACRO_ABC.replace("b", "content") + "{{ f(1, tools) }}", False),
        ("{% generation %}" + PARTS + "{% endgeneration %}", True),
        ("{% for m in messages %}{% if m %}{% break %}{% endif %}{% endfor %}", False),
        ("{% for m in", False),
    ],
)  # fmt: skip
def test_a_template_takes_parts_if_it_loops_over_the_content_of_a_message(template: str, parts: bool) -> None:
    assert template_form(template) == TemplateForm(parts=parts, developer=False)


@pytest.mark.parametrize(("source", "developer"), [("'developer'", True), ('"developer"', True), ("developer", False)])
def test_a_template_knows_the_developer_if_it_names_the_role(source: str, developer: bool) -> None:
    assert template_form(STRINGS + "{{ m == " + source + " }}").developer is developer


def test_the_kinds_in_use() -> None:
    takes_parts = {name for name, template in TOOL_TEMPLATES.items() if template_form(template.source).parts}
    assert takes_parts == {"parts", "macro"}
