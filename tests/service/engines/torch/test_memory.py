"""The memory that a batch needs is predicted before the first one: never too little, and not many times too much."""

import json
import os
import subprocess
import sys
from pathlib import Path

import peak_memory
import pytest
import torch
from dense_reward.engines.torch import memory
from dense_reward.engines.torch.memory import peak_bytes
from dense_reward.telemetry.process_memory import KERNEL_CACHES, grow_gpu_segments, keep_freed_memory
from peak_memory import CONFIGS, SHAPES, TOKENS
from transformers import LlamaConfig

pytestmark = pytest.mark.slow

Case = tuple[str, str, str]
CASES: tuple[Case, ...] = (
    *(("plain", shape, "float32") for shape in SHAPES),
    ("plain", "one sequence", "bfloat16"),
    ("tiny", "branches", "float32"),
    ("capped", "one sequence", "float32"),
    ("windowed", "short branches", "float32"),
    ("latent", "one sequence", "float32"),
    ("few experts", "branches", "float32"),
    ("many experts", "one sequence", "float32"),
    ("many experts", "one sequence", "bfloat16"),
)


@pytest.fixture(scope="module")
def measured() -> dict[Case, tuple[int, int]]:
    """Bytes that each case took, and bytes predicted: one process for all, because importing torch takes longest."""
    command = [sys.executable, "-W", "ignore", peak_memory.__file__, json.dumps(CASES)]
    environment = {**os.environ, **peak_memory.ENVIRONMENT}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {case: (line["peak"], line["bound"]) for case, line in zip(CASES, lines, strict=True)}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux reports the peak of a process")
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_batch_takes_no_more_than_was_said_and_not_many_times_less(
    measured: dict[Case, tuple[int, int]], case: Case
) -> None:
    peak, bound = measured[case]
    assert peak <= bound
    if case[0] in {"plain", "few experts", "many experts"}:  # a tiny model fills no tile; few batches need the worst
        assert bound <= 4 * peak


def test_more_tokens_wider_numbers_and_layers_need_more() -> None:
    config, larger = CONFIGS["plain"], LlamaConfig(**CONFIGS["plain"].to_dict() | {"hidden_size": 512})
    least = peak_bytes(config, tokens=TOKENS, itemsize=2, cuda=False)
    assert peak_bytes(config, tokens=2 * TOKENS, itemsize=2, cuda=False) > least
    assert peak_bytes(config, tokens=TOKENS, itemsize=4, cuda=False) > least
    assert peak_bytes(larger, tokens=TOKENS, itemsize=2, cuda=False) > least
    assert peak_bytes(config, tokens=TOKENS, itemsize=2, cuda=True) > least


@pytest.mark.parametrize("name", ["capped", "windowed", "latent"])
def test_what_kernels_lack_is_counted_where_it_is_written_down(name: str) -> None:
    plain, other = (peak_bytes(CONFIGS[each], tokens=TOKENS, itemsize=4, cuda=False) for each in ("plain", name))
    assert other > plain + (1 << 28)


def test_a_window_that_no_batch_reaches_costs_nothing() -> None:
    plain, windowed = (peak_bytes(CONFIGS[each], tokens=64, itemsize=4, cuda=False) for each in ("plain", "windowed"))
    assert plain == windowed


def test_freed_memory_is_kept_and_reused_once_enough_of_it_lies_there() -> None:
    """In a process of its own, because it is settled for good."""
    script = (
        "import resource, torch\n"
        "from dense_reward.telemetry.process_memory import keep_freed_memory\n"
        "keep_freed_memory()\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(20): torch.ones(1 << 24)\n"
        "before = faults()\n"
        "for _ in range(10): torch.ones(1 << 24)\n"
        "print(faults() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2000, "mapping 64 MiB again ten times would fault 160,000 pages"


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN in torch")  # type: ignore[no-untyped-call]
def test_kernels_that_are_compiled_for_each_number_of_rows_do_not_fill_the_memory() -> None:
    """In processes of their own, because torch reads the limit only once."""
    script = (
        "import sys\n"
        "from dense_reward.telemetry.process_memory import bound_kernel_caches, keep_freed_memory\n"
        "keep_freed_memory()\n"
        "if sys.argv[1] == 'bounded': bound_kernel_caches()\n"
        "import torch\n"
        "from dense_reward.engines.kernels.packed_weights import PackedWeight\n"
        "def resident(): return int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "weights = [PackedWeight(torch.ones(outputs, 256)) for outputs in (256, 512, 768, 1024)]\n"
        "def compute(rows):\n"
        "    for weight in weights: weight(torch.ones(rows, 256), None)\n"
        "with torch.inference_mode():\n"
        "    compute(600)\n"
        "    before = resident()\n"
        "    for rows in range(300, 600): compute(rows)\n"
        "print(resident() - before)\n"
    )

    # Without the limits that another test's service may have left in this process.
    environment = {name: value for name, value in os.environ.items() if name not in KERNEL_CACHES}

    def growth(how: str) -> int:
        command = [sys.executable, "-c", script, how]
        return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    assert growth("bounded") < growth("unbounded") / 2


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", None])
def test_gpu_memory_grows_in_segments_unless_the_environment_says_otherwise(
    name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {} if name is None else {name: "max_split_size_mb:128"}
    monkeypatch.setattr("os.environ", environment)
    grow_gpu_segments()
    assert environment == (
        {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if name is None else {name: "max_split_size_mb:128"}
    )


def test_another_c_library_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise OSError

    monkeypatch.setattr("ctypes.CDLL", missing)
    keep_freed_memory()


MEMINFO = "MemTotal: 100 kB\nMemAvailable:   2000 kB\nBuffers: 1 kB"
V2 = "/sys/fs/cgroup/memory"
V1 = "/sys/fs/cgroup/memory/memory"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 2_048_000),
        ({f"{V2}.max": "max", f"{V2}.current": "500"}, 2_048_000),
        ({f"{V2}.max": "1000000", f"{V2}.current": "400000", f"{V2}.stat": "anon 5\ninactive_file 100"}, 600_100),
        ({f"{V2}.max": "1000000", f"{V2}.current": "4000000"}, 0),
        ({f"{V1}.limit_in_bytes": "9223372036854771712", f"{V1}.usage_in_bytes": "5"}, 2_048_000),
        ({f"{V1}.limit_in_bytes": "1000", f"{V1}.usage_in_bytes": "5"}, 995),
        ({"/proc/meminfo": ""}, 0),
    ],
    ids=["machine", "no limit", "container", "container full", "old, no limit", "old", "unknown"],
)
def test_free_memory_is_that_of_the_machine_and_of_the_container(
    files: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {"/proc/meminfo": MEMINFO} | files
    monkeypatch.setattr(memory, "_text", lambda path: texts.get(path, ""))
    assert memory.free_bytes() == expected
