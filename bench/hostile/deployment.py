"""The chart and the Compose file, given an API key as their users could give it: what they render, or refuse with."""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

Json = dict[str, object]
CHART, COMPOSE, EXAMPLE = Path("helm/dense-reward"), Path("docker/compose.yaml"), Path("docker/.env.example")
PYTHONS = (".venv-deploy/bin/python", sys.executable)
RENDER = """
import json, sys, helm_python as helm
try:
    with helm.Chart.load(sys.argv[1]) as chart:
        print("".join(chart.render(json.load(sys.stdin), name="rewards", namespace="rl").values()))
except helm.HelmError as error:
    print("refused:", error)
"""
SECRETS = ("api_keys.json", "metrics_key", "grafana_password", "dpr_key")
PATIENCE_S = 120.0


def ways(key: str) -> Mapping[str, Json]:
    """Values that hold the key, by what their user wants."""
    job = {"name": "dpr", "job": "dpr", "recipe": "gsm8k_dpr", "requestCPU": "1", "requestMemory": "1Gi"}
    address = f"http://user:{key}@host:8000"
    bucket = {"uri": "s3://models/run", "endpointUrl": address}
    return {
        "keys by a secret's name": {"apiKeys": {"secretName": "keys"}, "trainer": {"apiKey": {"secretName": "key"}}},
        "keys in values": {"apiKeys": {"keys": [{"name": "a", "key": key, "rights": ["score"]}]}},
        "a key as a setting": {"settings": {"api_key": key}},
        "the key of model servers": {"engineKey": {"key": key}},
        "a key in the address of model servers": {"settings": {"engine": "remote", "sft_url": address}},
        "a key in the address of a collector": {"settings": {"otlp_endpoint": address}},
        "a key in the address of a bucket": {"checkpoints": {"source": "s3", "s3": bucket}},
        "a key in the changes of a job": {"trainer": {"jobs": [{**job, "changes": [f"service_url={address}"]}]}},
        "a key in the address of a proxy": {"env": [{"name": "HTTPS_PROXY", "value": address}]},
        "a token of the hub": {"hf_token": {"token": key}},
    }


def of_chart(key: str) -> Iterator[tuple[str, str]]:
    """What Helm's own code renders, or says, for each of the ways. Raises RuntimeError if it is not installed."""
    python = next((each for each in PYTHONS if _has_helm(each)), None)
    if python is None:
        raise RuntimeError("no helm-python-sdk, so the chart was not searched: make .venv-deploy/installed")
    for way, values in ways(key).items():
        yield f"chart: {way}", _output([python, "-c", RENDER, str(CHART)], json.dumps(values))


def of_compose(key: str) -> Iterator[tuple[str, str]]:
    """The Compose file with its variables filled in, as .env.example says, and with keys in the folder of secrets."""
    with tempfile.TemporaryDirectory() as folder:
        for name in SECRETS:
            Path(folder, name).write_text(key)
        lines = (line.lstrip("# ").partition("=") for line in EXAMPLE.read_text().splitlines())
        variables = {name: value for name, is_set, value in lines if is_set and name.isidentifier()}
        variables["SECRETS"] = folder
        filled = re.sub(
            r"\$\{(\w+)(?::-([^}]*))?\}",
            lambda found: variables.get(found[1], found[2] or ""),
            COMPOSE.read_text(),
        )
        if folder not in filled:
            raise RuntimeError("the Compose file names no folder of secrets, so nothing was searched")
        yield "compose", filled


def _has_helm(python: str) -> bool:
    try:
        done = subprocess.run(
            [python, "-c", "import helm_python"], capture_output=True, timeout=PATIENCE_S, check=False
        )
    except OSError:
        return False
    return done.returncode == 0


def _output(command: list[str], given: str) -> str:
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    return done.stdout + done.stderr
