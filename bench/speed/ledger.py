"""What was measured already, so that an interrupted run goes on: JSON lines in runs/bench/speed, by commit.

The commit is the last one that changed what is measured or how; the rest of the repository may move on.
"""

import hashlib
import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dense_reward.checkpoints.write_manifest import write_whole

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ("service", "bench/speed")
Record = Mapping[str, object]


@dataclass(slots=True)
class Ledger:
    """Records of rounds under their cell's name and number. `fresh`: what the file holds is not looked at."""

    file: Path
    commit: str
    fresh: bool
    _records: dict[tuple[str, int], Record] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Reads the file, and cuts off a last line that a kill left unfinished."""
        if not self.file.exists():
            return
        whole = self.file.read_text(encoding="utf-8").rpartition("\n")[:2]
        write_whole(self.file, "".join(whole).encode())
        known = [] if self.fresh else [json.loads(line) for line in whole[0].splitlines()]
        self._records = {
            (line["cell"], line["round"]): line["record"] for line in known if line["commit"] == self.commit
        }

    def get(self, cell: str, round_: int) -> Record | None:
        return self._records.get((cell, round_))

    def put(self, cell: str, round_: int, record: Record) -> None:
        self._records[cell, round_] = record
        self.file.parent.mkdir(parents=True, exist_ok=True)
        line = {"commit": self.commit, "cell": cell, "round": round_, "record": record}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def measured_commit() -> str:
    """With a hash of the changes behind it where files of service/ or bench/speed/ differ from it."""
    commit = _git("log", "-1", "--format=%H", "--", *MEASURED).strip()
    changed = _git("diff", "HEAD", "--", *MEASURED)
    new = _git("ls-files", "--others", "--exclude-standard", "--", *MEASURED).split()
    if not changed and not new:
        return commit
    digest = hashlib.sha256(changed.encode())
    for name in new:
        digest.update(name.encode() + (ROOT / name).read_bytes())
    return f"{commit}-dirty-{digest.hexdigest()[:8]}"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout
