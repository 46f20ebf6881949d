"""The ids of a prompt are those that vLLM itself makes of the same chat: its own package, without a model."""

from pathlib import Path

import pytest
from tool_templates import TOOL_TEMPLATES

from bench.rendering import CHATS, compare, model_folder

pytestmark = pytest.mark.vllm
EXCEPTIONS = {
    ("one object", "two calls at once, then another turn"): "refused by both",  # by the template itself
    ("parts", "developer after system"): "refused here",  # vLLM merges both into a string, which is rendered as nothing
}


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_every_chat_has_the_ids_of_vllm(name: str, tmp_path: Path) -> None:
    template = TOOL_TEMPLATES[name]
    compared = compare(model_folder(tmp_path, template.tokenizer().transformers_tokenizer))
    assert len(compared) == 3 * len(CHATS)
    for one in compared:
        assert one.verdict == EXCEPTIONS.get((name, one.chat), "equal"), (
            f"{one.chat} ({one.way}): {one.ours} instead of {one.theirs}"
        )
