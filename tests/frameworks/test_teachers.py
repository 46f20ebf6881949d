"""Distillation from a running service by the clients' own code: TRL, prime-rl, slime and miles get exact log-probs.

TRL is installed. The others are files of their repositories, with stand-ins for what these import and do not use here:
`make test-frameworks` fetches them and names them in the environment.
"""

import asyncio
import importlib.util
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from numpy.typing import NDArray
from pydantic import BaseModel
from served_pair import ServedPair, free_port, write_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")]

TOLERANCE_NATS = 1e-4
TEACHERS = {"default": 0.0, "default:reference": -1.0, "default:tilted=1.0": 1.0, "default:tilted=-0.5": -0.5}
each_teacher = pytest.mark.parametrize(("name", "tilt"), TEACHERS.items())
PROMPT, COMPLETION = [5, 6, 7, 30], [8, 9, 10, 200, 11]
SEQUENCES = [[*PROMPT, *COMPLETION], [40, 41, 42], [9, 9, 9, 9, 9, 9]]
PROMPTS = [4, 1, 3]


@dataclass(frozen=True)
class Running:
    """A service in a process of its own, and the folder of its two checkpoints."""

    url: str
    folder: Path

    def teacher(self, name: str) -> str:
        return f"{self.url}/teacher/{name}"

    def logprobs(self, ids: Sequence[int], tilt: float, temperature: float = 1.0) -> NDArray[np.float64]:
        """Before each id but the first, [L - 1, V], by transformers."""
        both = []
        for role in ("sft", "reference"):
            model = AutoModelForCausalLM.from_pretrained(self.folder / role, dtype=torch.float64)
            with torch.inference_mode():
                both.append(torch.log_softmax(model(torch.tensor([list(ids)])).logits[0, :-1], dim=-1))
        tilted = ((1 + tilt) * both[0] - tilt * both[1]) / temperature
        found: NDArray[np.float64] = torch.log_softmax(tilted, dim=-1).numpy()
        return found


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("pair")
    write_pair(folder)
    pair = ServedPair(folder, free_port())
    pair.start()
    try:
        pair.wait_until_ready()
        yield Running(pair.url, folder)
    finally:
        pair.kill()


@pytest.fixture
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's client asks whether vLLM is installed, but needs nothing of it to talk to a teacher."""
    monkeypatch.setattr("trl.generation.vllm_client.is_vllm_available", lambda *_: True)


def assert_near(found: object, expected: object) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE_NATS)  # type: ignore[call-overload]


@each_teacher
@pytest.mark.usefixtures("without_vllm")
def test_trls_client(running: Running, name: str, tilt: float) -> None:
    from trl.generation.vllm_client import VLLMClient  # noqa: PLC0415

    client = VLLMClient(base_url=running.teacher(name), connection_timeout=60.0)
    revision = client._get(f"{running.url}/models")["models"][0]["revision"]
    assert client.model == name.replace("default", f"default@{revision}"), "TRL's client is pinned without a setting"
    found = client.get_sequence_logprobs(SEQUENCES, PROMPTS, top_logprobs=6, temperature=0.8, chunk_size=2)
    for at, (ids, prompt) in enumerate(zip(SEQUENCES, PROMPTS, strict=True)):
        logprob_TV = running.logprobs(ids, tilt, 0.8)[prompt - 1 :]
        order_TK = np.argsort(-logprob_TV, axis=1)[:, :6]
        assert found["logprob_token_ids"][at] == order_TK.tolist()
        assert_near(found["logprobs"][at], np.take_along_axis(logprob_TV, order_TK, axis=1))
        assert_near(np.ravel(found["actual_logprobs"][at]), logprob_TV[np.arange(len(ids) - prompt), ids[prompt:]])


@each_teacher
def test_trls_asynchronous_worker(running: Running, name: str, tilt: float, monkeypatch: pytest.MonkeyPatch) -> None:
    aiohttp = pytest.importorskip("aiohttp")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # a warning at its import
    from accelerate import PartialState  # noqa: PLC0415
    from trl.experimental.async_distillation.async_rollout_worker import _AsyncRolloutLoop  # noqa: PLC0415

    PartialState(cpu=True)  # its logger needs one
    worker = object.__new__(_AsyncRolloutLoop)
    worker.teacher_server_urls, worker.teacher_model_names = {"dense": running.teacher(name)}, {}
    worker.teacher_top_k, worker.teacher_temperature, worker.request_timeout = 4, 1.0, 60
    worker._counters = defaultdict(float)

    async def ask() -> tuple[list[list[int]], list[list[float]]]:
        async with aiohttp.ClientSession() as worker.session:
            await worker._resolve_teacher_model_names()
            url, served = worker.teacher_server_urls["dense"], worker.teacher_model_names["dense"]
            found: tuple[list[list[int]], list[list[float]]] = await worker._score_with_teacher(
                PROMPT, COMPLETION, url, served
            )
            return found

    ids, logprobs = asyncio.run(ask())
    logprob_TV = running.logprobs([*PROMPT, *COMPLETION], tilt)[len(PROMPT) - 1 :]
    for own, row, values, logprob_V in zip(COMPLETION, ids, logprobs, logprob_TV, strict=True):
        likeliest = np.argsort(-logprob_V)[:4].tolist()
        assert row == likeliest + [own] * (own not in likeliest)
        assert_near(values, logprob_V[row])


def module(name: str, **members: object) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(members)
    return made


def imported(monkeypatch: pytest.MonkeyPatch, program: str, file: str, stand_ins: Sequence[ModuleType]) -> ModuleType:
    """A file of a program's source as a module. Skips the test if there is no such source."""
    folder = os.environ.get(f"FRAMEWORK_SOURCE_{program}")
    if folder is None:
        pytest.skip(f"needs the source of {program}: make test-frameworks")
    path = Path(folder) / file
    for stand_in in stand_ins:
        monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    spec = importlib.util.spec_from_file_location("client_under_test", path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


class Logprob(BaseModel):
    """vLLM's record of one log-prob."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


class GenerateChoice(BaseModel):
    index: int
    logprobs: object | None = None
    finish_reason: str | None = "stop"
    token_ids: list[int] | None = None


class GenerateResponse(BaseModel):
    """vLLM's answer, in place of the module that only an installed vLLM has."""

    request_id: str
    choices: list[GenerateChoice]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    kv_transfer_params: dict[str, object] | None = None


@each_teacher
def test_prime_rls_scorer(running: Running, name: str, tilt: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for needed in ("openai", "httpx", "tenacity"):
        pytest.importorskip(needed)
    configs = module("verifiers.v1", ClientConfig=object)
    stand_ins = [
        module("verifiers", v1=configs),
        configs,
        module("verifiers.v1.configs", client=None),
        module("verifiers.v1.configs.client", EvalClientConfig=SimpleNamespace, TrainClientConfig=SimpleNamespace),
        module("renderers", RendererConfig=object),
        module("prime_rl"),
        module("prime_rl.configs"),
        module("prime_rl.configs.shared", ClientConfig=object),
        module("prime_rl.utils"),
        module("prime_rl.utils.logger", get_logger=lambda: SimpleNamespace(debug=print, warning=print, error=print)),
        module("vllm.entrypoints.scale_out.token_in_token_out.protocol", GenerateResponse=GenerateResponse),
    ]
    parts = ["vllm", "entrypoints", "scale_out", "token_in_token_out"]
    stand_ins += [module(".".join(parts[: n + 1])) for n in range(len(parts))]
    client = imported(monkeypatch, "PRIME_RL", "src/prime_rl/utils/client.py", stand_ins)
    config = SimpleNamespace(
        base_url=f"{running.teacher(name)}/v1",
        api_key_var="NO_KEY",
        headers={},
        headers_from_env={},
        admin_base_url=None,
        skip_model_check=False,
        wait_for_ready_timeout=60,
    )

    async def ask() -> list[list[float]]:
        pool = client.InferencePool(config, name)
        await pool.wait_for_ready(name)
        found = await asyncio.gather(*(pool.score(ids) for ids in SEQUENCES))
        await asyncio.gather(pool.stop(), *(admin.aclose() for admin in pool.admin_clients))
        return list(found)

    for ids, found in zip(SEQUENCES, asyncio.run(ask()), strict=True):
        logprob_TV = running.logprobs(ids, tilt)
        assert found[0] == 0.0
        assert_near(found[1:], logprob_TV[np.arange(len(ids) - 1), ids[1:]])


@dataclass
class Sample:
    """What slime and miles keep of a sample, as far as their distillation reads it."""

    tokens: list[int]
    response_length: int
    reward: Any = None
    multimodal_inputs: object = None
    metadata: dict[str, object] = field(default_factory=dict)
    teacher_log_probs: Any = None
    opd_reverse_kl: Any = None

    def get_reward_value(self, _: object) -> object:
        return self.reward


def taught(client: ModuleType, args: SimpleNamespace) -> Sample:
    """One sample after the client's two functions: the request, and what it makes of the answer."""
    sample = Sample([*PROMPT, *COMPLETION], len(COMPLETION))
    sample.reward = asyncio.run(client.reward_func(args, sample))
    client.post_process_rewards(args, [sample])
    return sample


@each_teacher
def test_slimes_reward_function(running: Running, name: str, tilt: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp")
    stand_ins = [
        module("slime"),
        module("slime.utils"),
        module("slime.utils.processing_utils", encode_image_for_rollout_engine=None),
        module("slime.utils.types", Sample=Sample),
    ]
    client = imported(monkeypatch, "SLIME", "slime/rollout/on_policy_distillation.py", stand_ins)
    args = SimpleNamespace(rm_url=f"{running.teacher(name)}/generate", rollout_temperature=0.9)
    found = taught(client, args).teacher_log_probs
    logprob_TV = running.logprobs([*PROMPT, *COMPLETION], tilt, 0.9)[len(PROMPT) - 1 :]
    assert_near(found, logprob_TV[np.arange(len(COMPLETION)), COMPLETION])


@pytest.fixture
def miles(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("aiohttp")
    stand_ins = [module("miles"), module("miles.utils"), module("miles.utils.types", Sample=Sample)]
    return imported(monkeypatch, "MILES", "miles/rollout/on_policy_distillation.py", stand_ins)


@each_teacher
def test_miles_with_the_log_probs_of_sampled_tokens(
    running: Running, miles: ModuleType, name: str, tilt: float
) -> None:
    found = taught(miles, SimpleNamespace(rm_url=f"{running.teacher(name)}/generate")).teacher_log_probs
    logprob_TV = running.logprobs([*PROMPT, *COMPLETION], tilt)[len(PROMPT) - 1 :]
    assert_near(found, logprob_TV[np.arange(len(COMPLETION)), COMPLETION])


@pytest.mark.parametrize("per_position", [False, True], ids=["one list of ids", "a list for each position"])
@each_teacher
def test_miles_with_the_students_likeliest_ids(
    running: Running, miles: ModuleType, name: str, tilt: float, per_position: bool
) -> None:
    student = [[(-0.5 - n / 8, 20 + 3 * t + n, None) for n in range(2)] for t in range(len(COMPLETION))]
    url = f"{running.teacher(name)}/generate"
    args = SimpleNamespace(
        rm_url=url, opd_log_prob_top_k=2, opd_top_k_strategy="only-student", opd_topk_per_position=per_position
    )
    sample = Sample([*PROMPT, *COMPLETION], len(COMPLETION), metadata={"opd_student_top_logprobs": student})
    sample.reward = asyncio.run(miles.reward_func(args, sample))
    miles.post_process_rewards(args, [sample])
    logprob_TV = running.logprobs(sample.tokens, tilt)[len(PROMPT) - 1 :]
    for row, logprob_V, found in zip(student, logprob_TV, sample.opd_reverse_kl, strict=True):
        values, ids = [value for value, _, _ in row], [token for _, token, _ in row]
        weights = np.exp(values) / np.exp(values).sum()
        assert float(found) == pytest.approx(float(weights @ (values - logprob_V[ids])), abs=TOLERANCE_NATS)


@pytest.mark.parametrize(("name", "is_student"), [("default", True), ("default:tilted=1.0", False)])
@pytest.mark.usefixtures("without_vllm")
def test_trls_trainer_takes_steps_and_a_student_that_is_its_own_teacher_has_no_loss(
    running: Running, tmp_path: Path, name: str, is_student: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # a warning at its import
    from trl.experimental.server_distillation import (  # noqa: PLC0415
        ServerDistillationConfig,
        ServerDistillationTrainer,
    )

    student = running.folder / "sft"
    arguments = ServerDistillationConfig(
        output_dir=str(tmp_path),
        teacher_model_server_url=running.teacher(name),
        beta=1.0,
        loss_top_k=1,
        max_completion_length=8,
        max_steps=2,
        per_device_train_batch_size=4,
        logging_steps=1,
        learning_rate=1e-3,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    trainer = ServerDistillationTrainer(
        model=AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": [f"Add {n} and {2 * n}.\n" for n in range(11, 19)]}),
        processing_class=AutoTokenizer.from_pretrained(student),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert (abs(losses[0]) < TOLERANCE_NATS) == is_student
