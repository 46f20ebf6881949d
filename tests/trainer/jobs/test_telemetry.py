"""Jobs send no usage data: libraries are imported with their telemetry disabled, unless the user enables it."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
PROGRAM = """
from dense_reward_trainer.cli import main
main(["sft", "no such recipe"])
from huggingface_hub import constants
print(constants.HF_HUB_DISABLE_TELEMETRY)
"""


@pytest.mark.parametrize(("given", "disabled"), [({}, True), ({"HF_HUB_DISABLE_TELEMETRY": "0"}, False)])
def test_the_hubs_telemetry_is_disabled_unless_the_user_enables_it(given: dict[str, str], disabled: bool) -> None:
    others = {"HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK"}
    env = {name: value for name, value in os.environ.items() if name not in others} | given
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == str(disabled)
