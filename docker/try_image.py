"""Builds the CPU image of the service without a registry or a container engine, starts it, uses it, and lets it drain.

A Debian base from debootstrap replaces the base image of the Dockerfile; buildah runs the Dockerfile's steps. The
image's command then runs as the image's user, without capabilities, with a read-only root, as process 1 of a separate
process namespace. Writes the results to bench/results/image.json. Needs root on Linux, buildah and debootstrap.
BUILD_OPTIONS: more options for `buildah build`.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path

from bench.circumstances import circumstances

ROOT = Path(__file__).resolve().parents[1]
BASE = "localhost/dense-reward-try-base:bookworm"
PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"
PATH = "/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin"
KEY = "a-key-for-this-try-alone"
START_S = 120
VENV = "opt/dense-reward"
RESULTS = ROOT / "bench" / "results" / "image.json"
SHOWN_PACKAGES = ("dense-reward", "torch", "transformers", "tokenizers", "fastapi", "uvicorn")
# Does what a container engine does for --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges --user.
CONFINE = """
set -e
mount --bind "$TRY_ROOT" "$TRY_ROOT"
mount -t proc proc "$TRY_ROOT/proc"
mount --rbind /dev "$TRY_ROOT/dev"
mount -t tmpfs -o size=1g,mode=1777,noexec,nosuid,nodev tmpfs "$TRY_ROOT/tmp"
mount --bind "$TRY_VOLUME" "$TRY_ROOT/volume"
mount -o remount,bind,ro "$TRY_ROOT/volume"
mount -o remount,bind,ro "$TRY_ROOT"
exec chroot "$TRY_ROOT" setpriv --reuid "$TRY_USER" --regid "$TRY_USER" --clear-groups --no-new-privs \
    --bounding-set=-all --inh-caps=-all env --chdir /workspace --ignore-environment "$@"
"""


@dataclass(frozen=True, slots=True)
class Image:
    """The configuration from the Dockerfile's last stage, and the folder with the image's files."""

    root: Path
    user: str
    environment: Sequence[str]
    command: Sequence[str]
    healthcheck: Sequence[str]
    revision: str

    def versions(self) -> dict[str, str]:
        """Versions of Python and of the packages that serve and compute, by name."""
        (site,) = (self.root / VENV).glob("lib/python3.*/site-packages")
        found = {package.name: package.version for package in distributions(path=[str(site)])}
        return {"python": site.parent.name.removeprefix("python")} | {name: found[name] for name in SHOWN_PACKAGES}


@dataclass(frozen=True, slots=True)
class Found:
    """Results by name. Prints each result when it is noted."""

    results: dict[str, object] = field(default_factory=dict)

    def note(self, what: str, found: object) -> None:
        self.results[what] = found
        sys.stdout.write(f"try-image: {what}: {found}\n")
        sys.stdout.flush()

    def expect(self, what: str, found: object, wanted: object) -> None:
        """Notes a result. Ends the program if it is not the wanted one."""
        self.note(what, found)
        if found != wanted:
            sys.exit(f"try-image: {what} is {found}, but must be {wanted}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=Path, help="folder with sft and reference; default: the fake engine")
    checkpoints = parser.parse_args().checkpoints
    os.environ.setdefault("BUILDAH_ISOLATION", "chroot")
    at = circumstances()  # first, because this program's results change the checkout
    if BASE.partition(":")[0] not in output("buildah", "images", "--format", "{{.Name}}"):
        make_base()
    found = Found()
    started = time.monotonic()
    name = build()
    found.note("build_s", round(time.monotonic() - started))
    with tempfile.TemporaryDirectory() as volume, unpacked(name) as image:
        found.expect("revision", image.revision, at["commit"])
        found.note("unpacked_mb", megabytes(image.root))
        found.note("packages_mb", megabytes(image.root / VENV))
        found.note("versions", image.versions())
        try_service(image, volume, fill(Path(volume), checkpoints), found)
    pair = "none: the fake engine" if checkpoints is None else str(checkpoints)
    about = {"image": name, "checkpoints": pair, "buildah": output("buildah", "--version")}
    results = {**found.results, **about, **at, "versions": found.results["versions"]}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


def try_service(image: Image, volume: str, settings: Mapping[str, str], found: Found) -> None:
    """Starts the service, checks its process, its health check and its answers, and lets it drain."""
    port = free_port()
    with running(image, volume, {**settings, "DENSE_REWARD_PORT": str(port)}) as process:
        service = Service(f"http://127.0.0.1:{port}", process)
        found.note("ready_s", service.wait_until_ready())
        check_confinement(service.pid(), image.user, found)
        check_health(service.pid(), image, port, found)
        check_answers(service, found)
        check_drain(service, found)


def output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout.strip()


def make_base() -> None:
    """Builds a Debian image with Python and pip, which replaces the official Python image."""
    with tempfile.TemporaryDirectory() as folder:
        output("debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", folder)
        shutil.rmtree(Path(folder, "var", "cache", "apt"))
        container = output("buildah", "from", "scratch")
        output("buildah", "copy", "--quiet", container, folder, "/")
        output("buildah", "config", "--env", f"PATH={PATH}", container)
        output("buildah", "commit", "--quiet", "--rm", container, BASE)


def build() -> str:
    """Builds the service's CPU image and returns its name."""
    options = f"--layers --build-arg PYTHON_IMAGE={BASE} --build-arg UPGRADE= {os.environ.get('BUILD_OPTIONS', '')}"
    environment = {**os.environ, "BUILDER": "buildah", "BUILD_OPTIONS": options, "REGISTRY": "localhost/"}
    command = [str(ROOT / "docker" / "build.sh"), "service-cpu"]
    built = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return built.splitlines()[-1].removeprefix("built ")


def megabytes(folder: Path) -> int:
    """Size of all files below a folder."""
    return int(output("du", "--summarize", "--block-size=1M", folder).split()[0])


@contextmanager
def unpacked(name: str) -> Iterator[Image]:
    config = json.loads(output("buildah", "inspect", "--type", "image", name))["Docker"]["config"]
    container = output("buildah", "from", name)
    try:
        root = Path(output("buildah", "mount", container))
        (root / "volume").mkdir()
        yield Image(
            root,
            config["User"],
            config["Env"],
            [*config["Entrypoint"], *config["Cmd"]],
            config["Healthcheck"]["Test"],
            config["Labels"]["org.opencontainers.image.revision"],
        )
    finally:
        output("buildah", "rm", container)


def fill(volume: Path, checkpoints: Path | None) -> dict[str, str]:
    """Puts keys and checkpoints into the volume, readable for the container's user. Returns the settings for them."""
    volume.chmod(0o755)
    keys = [{"name": "try", "key": KEY, "rights": ["score"]}]
    (volume / "keys.json").write_text(json.dumps(keys))
    settings = {"DENSE_REWARD_API_KEYS_FILE": "/volume/keys.json"}
    if checkpoints is None:
        return {**settings, "DENSE_REWARD_ENGINE": "fake"}
    for role in ("sft", "reference"):
        shutil.copytree(checkpoints / role, volume / role)
        settings[f"DENSE_REWARD_{role.upper()}"] = f"/volume/{role}"
    return settings


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running(image: Image, volume: str, settings: Mapping[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    """Runs the image's command as process 1 of a process namespace, and kills it at the end if it still runs."""
    outside = {
        **os.environ,
        "TRY_ROOT": str(image.root),
        "TRY_VOLUME": volume,
        "TRY_USER": image.user.partition(":")[0],
    }
    inside = [*image.environment, *(f"{name}={value}" for name, value in settings.items())]
    confined = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", CONFINE, "confine"]
    with subprocess.Popen([*confined, *inside, *image.command], env=outside) as process:
        try:
            yield process
        finally:
            process.kill()


@dataclass(frozen=True, slots=True)
class Service:
    """The service in the container, seen from outside it."""

    url: str
    process: "subprocess.Popen[bytes]"

    def pid(self) -> int:
        """Process id of the container's process 1 in the outer namespace. Its parent is `unshare`."""
        parent = self.process.pid
        return int(Path(f"/proc/{parent}/task/{parent}/children").read_text().split()[0])

    def wait_until_ready(self) -> float:
        """Waits for /ready. Returns the seconds that it took. Ends the program if it fails or takes over START_S."""
        started = time.monotonic()
        while self.status("/ready") != 200:
            if self.process.poll() is not None or time.monotonic() > started + START_S:
                sys.exit(f"try-image: the service ended, or was not ready within {START_S} s: see its log above")
            time.sleep(0.2)
        return round(time.monotonic() - started, 1)

    def status(self, route: str, key: str | None = None, body: object = None) -> int:
        """Status of the response; 0 if nothing listens."""
        headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + route, data, headers)) as answer:
                answer.read()
                status: int = answer.status
                return status
        except urllib.error.HTTPError as refusal:
            return refusal.code
        except urllib.error.URLError:
            return 0


def check_confinement(pid: int, user: str, found: Found) -> None:
    """Checks user, capabilities and root of the running process, not only the options that it was started with."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = {name: values.split() for name, _, values in (line.partition(":") for line in lines)}
    found.expect("user", f"{status['Uid'][1]}:{status['Gid'][1]}", user)
    held = "".join(status[name][0].strip("0") for name in ("CapEff", "CapPrm", "CapBnd"))
    found.expect("capabilities", held or "none", "none")
    found.expect("no_new_privileges", status["NoNewPrivs"], ["1"])
    mounts = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
    (root,) = [fields[5] for fields in mounts if fields[4] == "/"]
    found.expect("root", root.split(",")[0], "ro")


def check_health(pid: int, image: Image, port: int, found: Found) -> None:
    """Runs the image's own health check inside the container."""
    kind, *command = image.healthcheck
    found.expect("health_check", kind, "CMD")
    inside = ["nsenter", "--target", str(pid), "--mount", "--pid", "--root"]
    as_user = ["setpriv", "--reuid", image.user.partition(":")[0], "--clear-groups", "env", "--ignore-environment"]
    environment = [*image.environment, f"DENSE_REWARD_PORT={port}"]
    done = subprocess.run([*inside, *as_user, *environment, *command], check=False)
    found.expect("health_check_exit_code", done.returncode, 0)


def check_answers(service: Service, found: Found) -> None:
    body = {"prompt": "Add 478 and 365.", "responses": ["8+5=13 write 3 carry 1", "8+5=15 write 3 carry 1"]}
    found.expect("score_without_key", service.status("/score", None, body), 401)
    found.expect("score", service.status("/score", KEY, body), 200)


def check_drain(service: Service, found: Found) -> None:
    """Sends SIGTERM while a large request is in flight: it must be answered, and the process must exit with code 0."""
    responses = ["8+5=13 write 3 carry 1. " * 6] * 2000
    body = {"prompt": "Add 478 and 365.", "responses": responses, "include": ["reward", "kl"]}
    with ThreadPoolExecutor() as threads:
        large = threads.submit(service.status, "/score", KEY, body)
        time.sleep(0.5)
        found.note("inside_at_sigterm", not large.done())
        os.kill(service.pid(), signal.SIGTERM)
        started = time.monotonic()
        found.expect("score_inside_at_sigterm", large.result(), 200)
        found.note("answered_after_sigterm_s", round(time.monotonic() - started, 1))
    found.expect("exit_code", service.process.wait(), 0)


if __name__ == "__main__":
    main()
