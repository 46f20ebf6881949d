"""What the stages share: the device, models and pairs made on it, and timing."""

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from dense_reward.engines.torch.model import TorchModel
from dense_reward.engines.torch.pair import ComputeOptions, PairEngine
from dense_reward.records import Branch, EngineInfo, Trunk
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench.speed.inputs import configuration
from bench.speed.workload import Lengths, Shape

Key = TypeVar("Key")
INFO = EngineInfo(
    sft="random weights",
    reference="random weights",
    revision="",
    dtype="bfloat16",
    device="cuda",
    vocab_size=0,
    max_length_tokens=32_768,
    quantities=frozenset(),
    related=True,
)
TINY_LENGTHS: Lengths = ((9, (7, 5)), (5, (3,)))


class Record(Protocol):
    """Writes figures of a stage."""

    def __call__(self, **found: object) -> None: ...


@dataclass(frozen=True, slots=True)
class Machine:
    """The device. `tiny`: shapes that a CPU computes in seconds, to test that a stage runs."""

    device: torch.device
    tiny: bool

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def shape(self, shape: Shape) -> Shape:
        return Shape(32, 2, 4, 2, 48, 512) if self.tiny else shape

    def lengths(self, lengths: Lengths) -> Lengths:
        return TINY_LENGTHS if self.tiny else lengths

    def model(self, shape: Shape, seed: int, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
        """A Qwen2 model with random weights, made on the device in seconds."""
        torch.manual_seed(seed)
        with self.device:
            return AutoModelForCausalLM.from_config(configuration(self.shape(shape)), dtype=dtype).eval()

    def engine(self, sft: PreTrainedModel, reference: PreTrainedModel) -> PairEngine:
        """The pair as the service would compute it, without its limit of a batch's tokens."""
        models = TorchModel(sft), TorchModel(reference)
        if self.device.type == "cuda":
            for model in models:
                print(f"CUDA graphs: {model.record_graphs()}", flush=True)
        return PairEngine(*models, INFO, ComputeOptions(1 << 20))

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object]) -> float:
        """Wall time until the device has ended."""
        self.wait()
        started_s = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - started_s

    def in_turns(self, calls: Mapping[Key, Callable[[], object]], *, rounds: int) -> dict[Key, float]:
        """Median seconds of each call, after one call of each that does not count, all in turns."""
        found: dict[Key, list[float]] = {key: [] for key in calls}
        for _ in range(1 + (1 if self.tiny else rounds)):
            for key, call in calls.items():
                found[key].append(self.seconds(call))
        return {key: statistics.median(times_s[1:]) for key, times_s in found.items()}

    def matmul_flops_per_s(self) -> float:
        """The fastest of some matrix multiplications of the models' shapes in bfloat16, each the median of 10."""
        from bench.speed.worker_peak import GPU_SHAPES  # noqa: PLC0415 - it tunes nothing, but imports transformers

        best = 0.0
        for rows, inner, outer in ((8, 8, 8),) if self.tiny else GPU_SHAPES:
            left, right = (torch.randn(n, inner, device=self.device).to(torch.bfloat16) for n in (rows, outer))
            times_s = [self.seconds(lambda: torch.nn.functional.linear(left, right)) for _ in range(20)]  # noqa: B023
            best = max(best, 2 * rows * inner * outer / statistics.median(times_s[10:]))
        return best


def trunks_of(lengths: Lengths, vocab_size: int, seed: int = 0) -> list[Trunk]:
    """Random ids; every token of every response is scored."""
    random = np.random.default_rng(seed)

    def ids(count: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        return random.integers(0, vocab_size, count).astype(np.int32)

    return [
        Trunk(ids(prompt), tuple(Branch(ids(n), np.ones(n, dtype=bool)) for n in responses))
        for prompt, responses in lengths
    ]


def rms(difference: Sequence[float] | np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(difference, dtype=np.float64)))))


def with_equal_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that shares the parameters, taken before an engine changes how the model is computed."""
    return copy.deepcopy(model, memo={id(parameter): parameter for parameter in model.parameters()})
