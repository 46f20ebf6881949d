"""Images and their build context: pins, users, cached layers, and files that must never get into a build."""

import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from threading import Thread

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
DOCKERFILE = DOCKER / "Dockerfile"
TARGETS = ("service", "trainer")  # on the Python image
ALL = (*TARGETS, "service-vllm")
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]


@dataclass(frozen=True, slots=True)
class Stage:
    """One FROM of a Dockerfile and what follows it, as (keyword, arguments)."""

    base: str
    name: str
    steps: Sequence[tuple[str, str]]

    def arguments(self, keyword: str) -> list[str]:
        return [arguments for word, arguments in self.steps if word == keyword]


def instructions() -> list[tuple[str, str]]:
    lines = [line for line in DOCKERFILE.read_text("utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def stages() -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    steps: list[tuple[str, str]] = []
    for keyword, arguments in instructions():
        if keyword == "FROM":
            base, _, name = arguments.split()
            steps = []
            found[name] = Stage(base, name, steps)
        else:
            steps.append((keyword, arguments))
    return found


def lineage(target: str) -> list[Stage]:
    """A stage and the stages that it is based on, the oldest first."""
    stage = stages()[target]
    return [*(lineage(stage.base) if stage.base in stages() else []), stage]


def of_image(target: str, keyword: str) -> list[str]:
    """The arguments of an instruction in all stages that become part of an image."""
    return [arguments for stage in lineage(target) for arguments in stage.arguments(keyword)]


def tool(name: str) -> str:
    """A program of this environment or of the path. Skips the test if there is none."""
    local = Path(sys.executable).parent / name
    found = str(local) if local.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def test_hadolint_finds_nothing() -> None:
    found = subprocess.run([tool("hadolint"), DOCKERFILE], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_shellcheck_finds_nothing() -> None:
    scripts = sorted(DOCKER.glob("*.sh"))
    found = subprocess.run([tool("shellcheck"), *scripts], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_all_stages_start_from_pinned_images_or_from_each_other() -> None:
    given = dict(arguments.split("=") for keyword, arguments in instructions() if "_IMAGE=" in arguments)
    assert re.fullmatch(r"[\w./]+:3\.\d+\.\d+-slim-\w+@sha256:[0-9a-f]{64}", given.pop("PYTHON_IMAGE"))
    # That of the Compose file's servers.
    assert (
        f"image: {given.pop('VLLM_IMAGE').replace('v0.', '${VLLM_TAG:-v0.')}}}" in (DOCKER / "compose.yaml").read_text()
    )
    assert given == {}
    known = {"${PYTHON_IMAGE}", "${VLLM_IMAGE}", "index-${DEVICE}", "index-cuda${CUDA}"}
    for stage in stages().values():
        assert stage.base in known
        known.add(stage.name)


@pytest.mark.parametrize("target", ALL)
def test_an_image_runs_as_a_user_by_number_who_is_not_root(target: str) -> None:
    users = of_image(target, "USER")
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", users[-1])


@pytest.mark.parametrize("target", ALL)
def test_commands_are_lists_so_that_signals_reach_them(target: str) -> None:
    commands = [*of_image(target, "ENTRYPOINT"), *of_image(target, "CMD")]
    assert len(commands) == 2
    assert all(isinstance(json.loads(command), list) for command in commands)


@pytest.mark.parametrize("target", ["service", "service-vllm"])
def test_the_service_checks_its_health_by_a_program_that_is_in_the_image(target: str) -> None:
    (check,) = of_image(target, "HEALTHCHECK")
    program, script, _ = json.loads(check.partition("CMD ")[2])
    assert program == "python3"  # vLLM's image has no `python`
    assert script in {copied.split()[-1] for copied in of_image(target, "COPY")}


@pytest.mark.parametrize("target", TARGETS)
def test_packages_lie_below_the_code_and_what_names_the_version_above_both(target: str) -> None:
    order = [f"{keyword} {arguments}" for keyword, arguments in stages()[target].steps]
    packages = order.index(f"COPY --from={target}-packages /opt/dense-reward /opt/dense-reward")
    code = order.index("COPY --from=code /code /opt/dense-reward")
    versions = [place for place, step in enumerate(order) if step.startswith(("ARG VERSION", "ARG REVISION"))]
    assert packages < code < min(versions)


@pytest.mark.parametrize("target", TARGETS)
def test_a_change_of_the_code_leaves_the_packages_as_they_are(target: str) -> None:
    copied = [arguments for stage in lineage(f"{target}-packages") for arguments in stage.arguments("COPY")]
    assert copied == ["pyproject.toml ./", "constraints constraints"]


@pytest.mark.parametrize("target", TARGETS)
def test_packages_are_pinned_and_come_as_wheels(target: str) -> None:
    (install,) = [step for step in stages()[f"{target}-packages"].arguments("RUN") if " install " in step]
    assert "--constraint" in install
    assert "--only-binary :all:" in install


@pytest.mark.parametrize("target", TARGETS)
def test_no_compiler_and_no_cache_is_in_an_image(target: str) -> None:
    assert "SYSTEM_PACKAGES=" in of_image(target, "ARG"), "nothing is installed unless a build requests it"
    assert "UPGRADE=1" in of_image(target, "ARG"), "the base has its patches"
    for command in of_image(target, "RUN"):
        assert "pip" not in command
        assert "apt-get" not in command or "rm -rf /var/lib/apt/lists/*" in command


@pytest.mark.parametrize("target", ALL)
def test_no_library_in_an_image_tells_anybody_how_it_is_used(target: str) -> None:
    variables = " ".join(of_image(target, "ENV")).split()
    assert {"DO_NOT_TRACK=1", "VLLM_NO_USAGE_STATS=1"} <= set(variables)


@pytest.mark.parametrize("target", ALL)
def test_an_image_says_what_it_is(target: str) -> None:
    (labels,) = of_image(target, "LABEL")
    named = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', labels))
    assert named["version"] == "${VERSION}"
    assert named["revision"] == "${REVISION}"
    assert named["licenses"] == "Apache-2.0"


def admitted(path: str) -> bool:
    """Whether .dockerignore keeps a file in the build context: the last pattern that matches decides."""
    parts = path.split("/")
    above = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    inside = True
    for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            anywhere = pattern.removeprefix("**/")
            names = parts if anywhere != pattern else above
            if any(fnmatchcase(name, anywhere) for name in names):
                inside = line.startswith("!")
    return inside


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".venv/bin/python",
        ".venv-vllm/bin/python",
        "runs/demo/checkpoints/sft/model.safetensors",
        "docker/.env",
        "docker/secrets/api_keys.json",
        "service/dense_reward/__pycache__/app.cpython-311.pyc",
        "service/dense_reward.egg-info/PKG-INFO",
        "service/.env",
        "tests/test_app.py",
    ],
)
def test_no_history_run_environment_or_secret_gets_into_a_build(path: str) -> None:
    assert not admitted(path)


def test_what_is_copied_gets_into_a_build_and_nothing_else_is_named() -> None:
    copied = {word for _, step in instructions() if _ == "COPY" and "--from" not in step for word in step.split()[:-1]}
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert {line[1:] for line in lines if line.startswith("!")} == copied
    assert all(admitted(path) for path in copied)
    assert all((ROOT / path).exists() for path in copied)
    assert admitted("service/dense_reward/http/web/index.html")


def built(folder: Path, *names: str, **environment: str) -> list[list[str]]:
    """The commands with which the script calls its builder."""
    builder = folder / "builder"
    builder.write_text(f"""#!/bin/sh\nprintf '%s\\t' "$@" >> {folder}/calls\necho >> {folder}/calls\n""")
    builder.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "BUILDER": str(builder), **environment}
    subprocess.run([str(DOCKER / "build.sh"), *names], check=True, capture_output=True, env=environment)
    return [line.rstrip("\t").split("\t") for line in (folder / "calls").read_text().splitlines()]


def after(command: Sequence[str], option: str) -> set[str]:
    return {word for before, word in pairwise(command) if before == option}


def test_the_usual_images_are_built_for_both_devices_and_tagged_by_version(tmp_path: Path) -> None:
    commands = built(tmp_path, REGISTRY="example.org/us/")
    made = [(after(command, "--target"), after(command, "--tag")) for command in commands]
    service, trainer = (f"example.org/us/{name}:{VERSION}" for name in ("dense-reward", "dense-reward-trainer"))
    assert made == [
        ({"service"}, {f"{service}-cpu"}),
        ({"service"}, {f"{service}-cuda", service}),
        ({"trainer"}, {f"{trainer}-cpu"}),
        ({"trainer"}, {f"{trainer}-cuda", trainer}),
    ]
    devices = [word for command in commands for word in after(command, "--build-arg") if word.startswith("DEVICE=")]
    assert devices == ["DEVICE=cpu", "DEVICE=cuda"] * 2


@pytest.mark.parametrize("name", ["service-cpu", "service-cuda12", "service-vllm", "trainer-cuda"])
def test_an_image_is_built_with_arguments_that_the_dockerfile_has(tmp_path: Path, name: str) -> None:
    (command,) = built(tmp_path, name)
    given = {word.partition("=")[0] for word in after(command, "--build-arg")}
    known = {arguments.partition("=")[0] for keyword, arguments in instructions() if keyword == "ARG"}
    assert {"VERSION", "REVISION"} <= given <= known
    assert after(command, "--format") == {"docker"}, "OCI's own format has no health check"
    labels = {word.partition("=")[0] for word in after(command, "--label")}
    assert labels == {"org.opencontainers.image.version", "org.opencontainers.image.revision"}


def test_vllm_comes_from_its_own_image_whose_packages_stay(tmp_path: Path) -> None:
    (command,) = built(tmp_path, "service-vllm")
    assert after(command, "--target") == {"service-vllm"}
    assert lineage("service-vllm")[0].base == "${VLLM_IMAGE}"
    pins, _ = (step for step in stages()["service-vllm"].arguments("RUN"))
    listed, chosen, install = re.findall(r"uv pip list|awk .*?'.*?'|uv pip install", pins)
    assert (listed, install) == ("uv pip list", "uv pip install")
    packages = (
        "# of the image\nTorch==2.12.0+cu130\npydantic_core==2.1\n# of the file\npydantic-core==2.2\nhttpx2==2.4\n"
    )
    done = subprocess.run(["sh", "-c", chosen], input=packages, capture_output=True, text=True, check=True)
    kept = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    assert kept == ["Torch==2.12.0+cu130", "pydantic_core==2.1", "httpx2==2.4"]


def test_images_for_older_drivers_have_another_build_of_torch(tmp_path: Path) -> None:
    for name in ("service-cuda12", "trainer-cuda12"):
        command = built(tmp_path, name)[-1]
        assert {"DEVICE=cuda", "CUDA=12"} < after(command, "--build-arg")
        assert {tag.rpartition("-")[2] for tag in after(command, "--tag")} == {"cuda12"}
    device = (ROOT / "service" / "dense_reward" / "engines" / "torch" / "device.py").read_text("utf-8")
    oldest = dict(re.findall(r"(\d+): (\d+)", device.partition("OLDEST_DRIVERS = {")[2].partition("}")[0]))
    page = (ROOT / "docs" / "deployment.md").read_text("utf-8")
    for cuda in ("12", "13"):
        assert f"| CUDA {cuda}, from driver {oldest[cuda]} on |" in page


@pytest.mark.parametrize(("cuda", "kept"), [("13", True), ("12", False)])
def test_cuda_13_packages_are_pinned_only_for_cuda_13(tmp_path: Path, cuda: str, kept: bool) -> None:
    """torch for CUDA 12 needs other versions of them: with the pins, pip would take torch for 13, or nothing."""
    (step,) = (text for text in stages()["project"].arguments("RUN") if "${CUDA}" in text)
    shutil.copytree(ROOT / "constraints", tmp_path / "constraints")
    subprocess.run(["sh", "-c", step], cwd=tmp_path, env={**os.environ, "CUDA": cuda}, check=True)
    pins = (tmp_path / "constraints" / "default.txt").read_text("utf-8")
    assert (re.search(r"^(cuda|nvidia)-", pins, re.MULTILINE) is not None) == kept
    assert re.search(r"^torch==", pins, re.MULTILINE)


def test_the_gpu_image_has_a_compiler_for_its_kernels(tmp_path: Path) -> None:
    (command,) = built(tmp_path, "service-cuda")
    assert {"DEVICE=cuda", "SYSTEM_PACKAGES=gcc libc6-dev"} < after(command, "--build-arg")


def test_what_was_built_is_pushed_with_every_tag(tmp_path: Path) -> None:
    pushed = built(tmp_path, "trainer-cuda", PUSH="1")
    assert pushed == [["push", f"dense-reward-trainer:{VERSION}-cuda"], ["push", f"dense-reward-trainer:{VERSION}"]]


def test_the_page_says_what_was_found_of_a_built_image() -> None:
    """`make try-image` writes these results."""
    found = json.loads((ROOT / "bench" / "results" / "image.json").read_text("utf-8"))
    page = (ROOT / "docs" / "deployment.md").read_text("utf-8")
    assert found["revision"] == found["commit"]
    for row in (
        f"unpacked | {found['unpacked_mb']:,} MB, of which {found['packages_mb']:,} MB are packages",
        f"time of a build without a cache; the base image is not included | {found['build_s']} s",
        f"time from the start until `/ready` answers 200, with the demo's pair | {found['ready_s']} s",
        f"health check | {found['user']}, {found['capabilities']}, read-only, exit code 0",
        f"status of `/score` without a key, and with one | {found['score_without_key']}, {found['score']}",
        f"answered with {found['score_inside_at_sigterm']} after {found['answered_after_sigterm_s']} s",
    ):
        assert row in page
    assert (found["root"], found["inside_at_sigterm"]) == ("ro", True)
    assert (found["health_check_exit_code"], found["exit_code"]) == (0, 0)


class Answer(BaseHTTPRequestHandler):
    """A service that is alive but not ready."""

    def do_GET(self) -> None:
        body = b"" if self.path == "/health" else b'{"state": "loading"}'
        self.send_response(503 if body else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *_: object) -> None:
        """Logs nothing: the tests' output needs no line for each request."""


def checked(route: str, server: ThreadingHTTPServer, **settings: str) -> tuple[int, str]:
    """Exit code and output of the health check. It must not use the environment's proxy, which does not exist."""
    environment = {"DENSE_REWARD_PORT": str(server.server_port), "http_proxy": "http://127.0.0.1:9", **settings}
    command = [sys.executable, str(DOCKER / "healthcheck.py"), route]
    done = subprocess.run(command, env=environment, capture_output=True, check=False, text=True)
    return done.returncode, done.stdout + done.stderr


@contextmanager
def served(context: ssl.SSLContext | None = None) -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_the_health_check_tells_what_the_service_answers() -> None:
    with served() as server:
        assert checked("/health", server) == (0, "")
        assert checked("/ready", server) == (1, '/ready: 503 {"state": "loading"}\n')
    code, said = checked("/health", server)
    assert (code, said.count("\n")) == (1, 1)
    assert "Connection refused" in said


def test_the_health_check_speaks_https_where_the_service_does(tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    made = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=elsewhere", "-days", "2"]
    made += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([tool("openssl"), *made], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with served(context) as server:
        assert checked("/health", server, DENSE_REWARD_TLS_CERTIFICATE=str(certificate))[0] == 0
        assert checked("/ready", server, DENSE_REWARD_TLS_CERTIFICATE=str(certificate))[0] == 1
