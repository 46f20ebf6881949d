"""How much memory a process holds, or a device: read from the system, in megabytes of 10^6 bytes."""

import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

FORGET_PEAK = "5"  # see proc(5), clear_refs
KIB, MB = 1024, 1e6
BETWEEN_S = 0.05


@dataclass(slots=True)
class Peak:
    """`peak_mb` is what was held at most while it was watched; filled once the watching ends."""

    peak_mb: float = 0.0


def resident_mb(pid: int) -> float:
    return _status_mb(pid, "VmRSS")


def total_bytes() -> int:
    """What the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextmanager
def watched(pid: int, device: str) -> Iterator[Peak]:
    """The peak within the block: of the process, or of all of the device where there is one."""
    peak = Peak()
    if device == "cpu":
        Path(f"/proc/{pid}/clear_refs").write_text(FORGET_PEAK)
        yield peak
        peak.peak_mb = _status_mb(pid, "VmHWM")
        return
    over = threading.Event()
    thread = threading.Thread(target=_follow, args=(peak, over))
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def device_mb() -> float:
    """Memory used on the first GPU, by everyone."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * KIB * KIB / MB


def held_mb(pid: int, device: str) -> float:
    return resident_mb(pid) if device == "cpu" else device_mb()


def _follow(peak: Peak, over: threading.Event) -> None:
    while not over.wait(BETWEEN_S):
        peak.peak_mb = max(peak.peak_mb, device_mb())


def _status_mb(pid: int, name: str) -> float:
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(lines[name].split()[0]) * KIB / MB
