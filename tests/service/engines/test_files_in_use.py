"""What happens to the files of a checkpoint while it is loaded and served."""

from pathlib import Path

import numpy as np
import pytest
from dense_reward.engines.torch.load import LoadContext, ServingOptions, load_pair
from dense_reward.errors import CheckpointError
from dense_reward.records import Wants
from tiny_models import random_trunk, write_pair

pytestmark = pytest.mark.slow

SERVING = ServingOptions(max_batch_tokens=1000)


def test_what_is_written_to_the_files_later_changes_nothing(tmp_path: Path) -> None:
    """transformers maps the files into memory, so without a copy the served model would be what is written."""
    sft, reference = write_pair(tmp_path)
    engine = load_pair(sft, reference, SERVING, LoadContext(lambda _: None))[0]
    trunk = random_trunk(0, 6, (8, 3))
    before = engine.score([trunk], Wants())[0]
    with (sft / "model.safetensors").open("r+b") as file:
        file.write((reference / "model.safetensors").read_bytes())
    for one, other in zip(before, engine.score([trunk], Wants())[0], strict=True):
        np.testing.assert_array_equal(one.sft_logprob_S, other.sft_logprob_S)


def test_files_that_change_while_they_are_loaded_are_refused(tmp_path: Path) -> None:
    """Their hashes are of something else by then."""
    sft, reference = write_pair(tmp_path)

    def report(step: str) -> None:
        if step.startswith("loading reference"):
            (sft / "config.json").touch()

    with pytest.raises(CheckpointError, match=r"config.json was changed while it was loaded: write checkpoints into"):
        load_pair(sft, reference, SERVING, LoadContext(report))
