"""Verification of models in other engines: the error names the one that is wrong."""

import asyncio
import json
from collections.abc import Mapping
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from dense_reward.engines.proof import Checkpoint
from dense_reward.engines.remote.load import PROBE_COPIES, verify_sources
from dense_reward.engines.remote.lora import refuse_output_layer
from dense_reward.engines.remote.pair import Query
from dense_reward.errors import CheckpointError, SequenceError
from dense_reward.manifest import Manifest, ProbeResponse, ProbeSequence
from dense_reward.records import FloatArray

SEQUENCES = {(5, 6): ((7, 8, 9), (10, 11)), (12,): ((13, 14), (15, 16, 17))}
APART = 0.1
"""Nats between the probes of the two checkpoints: within the tolerance of bfloat16."""


def manifest(logprob: float) -> Manifest:
    """The manifest of a checkpoint that gives every token the same log-prob."""
    probe = tuple(
        ProbeSequence(
            prompt_ids=prompt,
            responses=tuple(ProbeResponse(ids=ids, logprobs=(logprob,) * len(ids)) for ids in responses),
        )
        for prompt, responses in SEQUENCES.items()
    )
    fields: dict[str, object] = {
        "renderer": "plain",
        "end_of_turn_id": None,
        "vocabulary": 20,
        "dtype": "bfloat16",
        "files": {},
    }
    hashes = {"tokenizer_sha256": "a", "template_sha256": "b"}
    return Manifest.model_validate(
        {"role": "sft", "run_id": "a", "probe": probe, "created_at": "now", **fields, **hashes}
    )


class ConstantSource:
    """Gives every token the same log-prob, except in one query."""

    def __init__(self, logprob: float, *, odd_query: int | None = None) -> None:
        self._logprob = logprob
        self._odd_query = odd_query
        self._query_numbers = count()

    async def logprobs(self, query: Query) -> FloatArray:
        error = 2.0 if next(self._query_numbers) == self._odd_query else 0.0
        return np.full(query.wanted_TK.shape, self._logprob + error, dtype=np.float32)


def verify(sources: Mapping[str, ConstantSource], dtype: str = "bfloat16") -> list[str]:
    lines: list[str] = []
    sft = Checkpoint("sft", Path("sft"), manifest(-1.0), dtype)
    reference = Checkpoint("reference", Path("reference"), manifest(-1.0 - APART), dtype)
    asyncio.run(verify_sources(sources, sft, reference, lines.append))
    return lines


def test_a_right_model_is_reported_with_its_difference() -> None:
    (line,) = verify({"sft at a": ConstantSource(-1.0)})
    assert line.startswith("probe of sft at a: rms difference 0 nats over 10 tokens")


@pytest.mark.parametrize("logprob", [-1.5, -0.5, float("nan")])
def test_a_wrong_one_is_named(logprob: float) -> None:
    with pytest.raises(CheckpointError, match="sft at b is computed wrong"):
        verify({"sft at a": ConstantSource(-1.0), "sft at b": ConstantSource(logprob)})


@pytest.mark.parametrize("query", range(4 * PROBE_COPIES))
def test_every_copy_must_be_right_whatever_is_asked_beside_it(query: int) -> None:
    with pytest.raises(CheckpointError, match="sft at a is computed wrong"):
        verify({"sft at a": ConstantSource(-1.0, odd_query=query)})


def test_a_probe_that_a_server_refuses_is_told() -> None:
    class Refusing(ConstantSource):
        async def logprobs(self, query: Query) -> FloatArray:
            raise SequenceError("http://a: answered 400")

    with pytest.raises(CheckpointError, match="probe of sft is refused: http://a: answered 400"):
        verify({"sft at a": Refusing(-1.0)})


def test_the_other_checkpoint_is_recognised_where_rounding_would_hide_it() -> None:
    with pytest.raises(CheckpointError, match="are the two exchanged"):
        verify({"sft at a": ConstantSource(-1.0 - APART)})


def test_replicas_that_disagree_with_each_other_are_named() -> None:
    with pytest.raises(CheckpointError, match=r"sft at a and sft at b disagree by 0\.34 nats"):
        verify({"sft at a": ConstantSource(-0.71), "sft at b": ConstantSource(-1.05)})


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["model.embed_tokens"]},
        {"target_modules": ".*"},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": "all-linear", "modules_to_save": ["embed_tokens"]},
    ],
)
def test_an_adapter_that_changes_the_output_layer_is_refused(config: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="ignores in the log-probs"):
        refuse_output_layer(tmp_path)


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear", r".*\.self_attn\.[qv]_proj", None])
def test_other_adapters_are_not(targets: object, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"target_modules": targets, "modules_to_save": None}))
    refuse_output_layer(tmp_path)


def test_an_adapter_of_which_nobody_knows_what_it_changes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json, which lists the layers"):
        refuse_output_layer(tmp_path)
