"""How much of a reward is rounding: the configuration that is served, and others that lower it, compared with float32.

A reward is the difference of two nearly equal log-probs, so the rounding of 16-bit dtypes weighs more in it than in
either of them.
"""

import gc
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dense_reward.engines.kernels import compiled
from dense_reward.engines.proof import probe_trunks
from dense_reward.engines.torch.load import LoadContext, ServingOptions, load_pair
from dense_reward.engines.torch.pair import PairEngine
from dense_reward.errors import CheckpointError
from dense_reward.manifest import load_manifest
from dense_reward.records import Branch, FloatArray, Report, Trunk, Wants
from dense_reward.reward import reward

AS_SERVED = "as served"
TIMED_RUNS = 3
TIMED_SHAPE = (64, 8, 64)  # prompt tokens, responses, tokens of each


@dataclass(frozen=True, slots=True)
class Noise:
    """One configuration: rms(reward - float32 reward) / std(float32 reward), seconds of a batch, bytes of weights.

    They are None if the pair cannot be loaded in it; `refused` is the reason.
    """

    name: str
    noise: float | None = None
    seconds: float | None = None
    weights_bytes: int | None = None
    refused: str | None = None


@dataclass(frozen=True, slots=True)
class Exact:
    """The baseline of the comparison: the float32 rewards of both probes, [S] nats."""

    trunks: tuple[Trunk, ...]
    reward_S: FloatArray

    @property
    def std(self) -> float:
        return float(np.std(self.reward_S))


OF_CPUS: Mapping[str, str] = {"pack_weights": "packed weights", "compile_kernels": "compiled kernels"}
"""Settings that only change how a CPU computes."""


def exact_rewards(sft: Path, reference: Path, serving: ServingOptions, report: Report) -> Exact:
    """Both probes' sequences, scored in float32. Raises CheckpointError if every token has the same reward."""
    trunks = (*probe_trunks(load_manifest(sft)), *probe_trunks(load_manifest(reference)))
    as_torch_does = dict.fromkeys(OF_CPUS, False)
    plain = replace(serving, dtype="float32", head_dtype=None, norm_dtype=None, **as_torch_does)  # type: ignore[arg-type]
    engine = load_pair(sft, reference, plain, LoadContext(report))[0]
    exact = Exact(trunks, _rewards(engine, trunks))
    if exact.std == 0:
        raise CheckpointError(
            "every token of the probe has the same reward: the two checkpoints hardly differ; choose another reference"
        )
    return exact


def configurations(serving: ServingOptions) -> dict[str, ServingOptions]:
    """As served, and changes that can lower the noise, one configuration each."""
    changes: dict[str, dict[str, str | bool]] = {
        **(
            {f"no {what}": {name: False} for name, what in OF_CPUS.items() if getattr(serving, name)}
            if serving.device == "cpu"
            else {}
        ),
        "float32 head": {"head_dtype": "float32"},
        "float32 norms": {"norm_dtype": "float32"},
        "float32 head and norms": {"head_dtype": "float32", "norm_dtype": "float32"},
        "float16 weights": {"dtype": "float16"},
        "float16 weights, float32 head": {"dtype": "float16", "head_dtype": "float32"},
        "float32 weights": {"dtype": "float32"},
    }
    return {AS_SERVED: serving} | {name: replace(serving, **change) for name, change in changes.items()}  # type: ignore[arg-type]


def measure_noise(sft: Path, reference: Path, serving: ServingOptions, exact: Exact, report: Report) -> Iterator[Noise]:
    """The noise of each configuration and its cost, one after another: never two pairs in memory at a time.

    If the pair is already served in float32 or float64, only that one, because nothing lowers its noise.
    """
    for name, configuration in configurations(serving).items():
        # What an earlier configuration compiled holds for the process.
        with nullcontext() if configuration.compile_kernels else compiled.off():
            noise, dtype = _noise(name, (sft, reference), configuration, exact, report)
        yield noise
        gc.collect()  # reference cycles would keep its weights while the next pair is loaded
        if name == AS_SERVED and dtype in {"float32", "float64"}:
            return


def _noise(
    name: str, checkpoints: tuple[Path, Path], serving: ServingOptions, exact: Exact, report: Report
) -> tuple[Noise, str | None]:
    """One configuration, and the dtype in which it was computed."""
    try:
        engine = load_pair(*checkpoints, serving, LoadContext(report))[0]
    except (CheckpointError, RuntimeError) as error:  # RuntimeError: a dtype that the device lacks
        return Noise(name, refused=str(error)), None
    difference_S = _rewards(engine, exact.trunks) - exact.reward_S
    noise = float(np.sqrt(np.mean(difference_S.astype(np.float64) ** 2))) / exact.std
    return Noise(name, noise, _seconds(engine), engine.weights_bytes), engine.info.dtype


def _rewards(engine: PairEngine, trunks: Sequence[Trunk]) -> FloatArray:
    scores = engine.score(trunks, Wants())
    return np.concatenate([reward(of_branch) for of_trunk in scores for of_branch in of_trunk])


def _seconds(engine: PairEngine) -> float:
    """Median of a few batches of one shape with random ids."""
    random = np.random.default_rng(0)
    prompt, responses, length = TIMED_SHAPE
    length = min(length, engine.info.max_length_tokens // 2)
    prompt = min(prompt, engine.info.max_length_tokens - length)

    def ids(count: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        return random.integers(0, engine.info.vocab_size, count).astype(np.int32)

    trunk = Trunk(ids(prompt), tuple(Branch(ids(length), np.ones(length, dtype=bool)) for _ in range(responses)))
    engine.score([trunk], Wants())
    seconds = []
    for _ in range(TIMED_RUNS):
        started = time.perf_counter()
        engine.score([trunk], Wants())
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
