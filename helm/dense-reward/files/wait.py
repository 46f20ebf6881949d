"""Waits until the checkpoints of a claim are complete, and says how to copy them there: an init container's command.

Arguments: the folder where the claim is mounted, and the checkpoints' folders below it.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path

from dense_reward.errors import CheckpointError
from dense_reward.manifest import adapter_base_folder, files_folder, load_manifest

CHECK_EVERY_S = 5.0
REPORT_EVERY = 12
"""Checks between two lines of the log."""


def missing(folder: Path) -> str | None:
    """What is missing of a checkpoint: its manifest, or a file that the manifest lists. None: it is complete."""
    try:
        manifest = load_manifest(folder)
        files = [files_folder(folder, manifest) / name for name in manifest.files]
        base = adapter_base_folder(folder, manifest)
    except CheckpointError as error:
        return str(error)
    files += [] if base is None else [base / name for name in manifest.adapter_base_files]
    return next((f"{file} is missing or incomplete" for file in files if not is_whole(file)), None)


def is_whole(file: Path) -> bool:
    """A file of weights says in its head how long it is; every other file is small."""
    if file.suffix != ".safetensors":
        return file.is_file()
    try:
        with file.open("rb") as opened:
            head = int.from_bytes(opened.read(8), "little")
            tensors = json.loads(opened.read(head))
    except (OSError, ValueError):
        return False
    ends = [tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__"]
    return file.stat().st_size >= 8 + head + max(ends, default=0)


def main(mount: str, *folders: str) -> None:
    checks, complete = 0, 0
    while complete < 2:  # twice: a small file that came last has been written when the second one ends
        found = next((text for folder in folders if (text := missing(Path(mount, folder)))), None)
        complete = 0 if found else complete + 1
        if found and checks % REPORT_EVERY == 0:
            command = f"kubectl --namespace {os.environ['NAMESPACE']} exec -i {socket.gethostname()} -c checkpoints"
            sys.stdout.write(
                f"waiting: {found}\nTo copy the checkpoints, in the folder that holds them:\n"
                f"  tar -c {' '.join(folders)} | {command} -- tar -x -C {mount}\n"
            )
            sys.stdout.flush()
        checks += 1
        time.sleep(CHECK_EVERY_S)
    sys.stdout.write(f"complete: {', '.join(folders)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
