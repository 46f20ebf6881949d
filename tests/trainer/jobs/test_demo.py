"""The demo's example, its link and what it says at its end. Its training and its service run in test_notebook.py."""

import base64
import json
import re
import zlib
from importlib.resources import files

import pytest
from dense_reward_trainer.commands import JOBS
from dense_reward_trainer.configs.base import load_config
from dense_reward_trainer.configs.sft import SftConfig
from dense_reward_trainer.data.final_answers import final_answer
from dense_reward_trainer.data.sources import load, split
from dense_reward_trainer.jobs.demo import ADDENDS, COMPARED, NEXT, example, next_commands, view
from dense_reward_trainer.recipe_files import config_path

WEB = files("dense_reward") / "http" / "web"


def test_the_example_is_held_out_and_its_second_answer_is_wrong() -> None:
    prompt, (right, wrong) = example()
    assert final_answer(right) == str(sum(ADDENDS)) != final_answer(wrong)
    data = load_config(SftConfig, config_path("demo_sft")).data
    held_out = split(load(data).demonstrations, data.held_out_fraction, data.seed).held_out
    assert prompt in {one.prompt_messages[0].content for one in held_out}
    assert len(held_out) >= COMPARED


def test_base_and_sft_model_learn_other_sums() -> None:
    prompts = [
        {one.prompt_messages for one in load(load_config(SftConfig, config_path(recipe)).data).demonstrations}
        for recipe in ("demo_base_sft", "demo_sft")
    ]
    assert len(prompts[0]) >= 1000 <= len(prompts[1])
    assert not prompts[0] & prompts[1]


def test_the_pages_example_is_that_of_the_demo() -> None:
    form = (WEB / "form.js").read_text()
    prompt, answers = example()
    assert f'prompt: "{prompt}"' in form
    shown = re.findall(r'text: "([^"]+)", thoughts: ""', form)
    assert [text.replace("\\n", "\n") for text in shown] == answers


def test_the_link_holds_the_example_in_the_version_that_the_page_reads() -> None:
    version, _, code = view().partition("=")
    assert f'const VERSION = "{version.removeprefix("v")}"' in (WEB / "link.js").read_text()
    opened = json.loads(zlib.decompress(base64.urlsafe_b64decode(code + "=" * (-len(code) % 4)), -zlib.MAX_WBITS))
    prompt, answers = example()
    assert opened["input"]["prompt"] == prompt
    assert [response["text"] for response in opened["input"]["responses"]] == answers


@pytest.mark.parametrize("serves", [True, False])
def test_three_commands_are_shown_that_exist_and_find_the_service(serves: bool) -> None:
    lines = next_commands(8123, serves=serves)
    commands = [line.split("#")[0].split() for line in lines if line.startswith("  dense-reward-train ")]
    assert len(commands) == len(NEXT) == 3
    for _, job, recipe, *overrides in commands:
        assert job in JOBS
        assert config_path(recipe).is_file()
        assert overrides == (["service_url=http://127.0.0.1:8123"] if serves and job != "preview" else [])
