"""Every setting has a flag, an environment variable, a help text, and a refusal that names it."""

import argparse
import os
from pathlib import Path

import pytest
from dense_reward.cli import main
from dense_reward.command_line.arguments import parser
from dense_reward.errors import SettingsError
from dense_reward.settings import ENV_PREFIX, Settings, env_name, flag, read_settings

# A value other than the default for every setting, as a command line or an environment gives it.
EXAMPLES: dict[str, tuple[str, object]] = {
    "sft": ("runs/a/sft", Path("runs/a/sft")),
    "reference": ("runs/a/reference", Path("runs/a/reference")),
    "name": ("gsm8k", "gsm8k"),
    "token_head": ("runs/a/token_head", Path("runs/a/token_head")),
    "pairs_file": ("pairs.json", Path("pairs.json")),
    "run": ("runs/a", Path("runs/a")),
    "checkpoints_folder": ("runs", Path("runs")),
    "engine": ("fake", "fake"),
    "sft_url": ("http://a:8000,http://b:8000", "http://a:8000,http://b:8000"),
    "reference_url": ("http://c:8000", "http://c:8000"),
    "sft_served": ("sft-adapter", "sft-adapter"),
    "reference_served": ("half-adapter", "half-adapter"),
    "engine_key_file": ("key", Path("key")),
    "tensor_parallel": ("4", 4),
    "gpu_memory_utilization": ("0.4", 0.4),
    "vllm_options": ('{"quantization": "fp8"}', '{"quantization": "fp8"}'),
    "dtype": ("bfloat16", "bfloat16"),
    "head_dtype": ("float32", "float32"),
    "norm_dtype": ("float32", "float32"),
    "pack_weights": ("false", False),
    "compile_kernels": ("false", False),
    "deterministic": ("true", True),
    "reference_device": ("cuda:1", "cuda:1"),
    "device": ("cuda:1", "cuda:1"),
    "threads": ("3", 3),
    "allow_unrelated": ("true", True),
    "host": ("0.0.0.0", "0.0.0.0"),
    "port": ("0", 0),
    "api_keys_file": ("keys.json", Path("keys.json")),
    "open_metrics": ("true", True),
    "tls_certificate": ("certificate.pem", Path("certificate.pem")),
    "tls_private_key": ("private.pem", Path("private.pem")),
    "max_batch_tokens": ("512", 512),
    "max_queue_tokens": ("9999", 9999),
    "max_length_tokens": ("777", 777),
    "max_body_bytes": ("1000", 1000),
    "max_items": ("5", 5),
    "max_responses": ("6", 6),
    "max_heatmap_tokens": ("8", 8),
    "max_json_depth": ("9", 9),
    "max_arrival_s": ("0.5", 0.5),
    "max_request_s": ("2.5", 2.5),
    "drain_s": ("7", 7),
    "results_bytes": ("1000", 1000),
    "isolate_keys": ("true", True),
    "log_format": ("json", "json"),
    "otlp_endpoint": ("http://collector:4318", "http://collector:4318"),
    "log_level": ("debug", "debug"),
}
NAMES = sorted(Settings.model_fields)


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith(ENV_PREFIX)]:
        monkeypatch.delenv(name)


def test_every_setting_is_tried_here() -> None:
    assert sorted(EXAMPLES) == NAMES


def test_every_setting_is_described_and_shown_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, setting in Settings.model_fields.items():
        assert setting.description, name
        assert f"{flag(name)} " in shown or f"{flag(name)}, " in shown
        assert f"{' '.join(setting.description.split())} [{env_name(name)}" in shown


@pytest.mark.parametrize("name", NAMES)
def test_the_environment_sets_what_the_command_line_leaves_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, value = EXAMPLES[name]
    assert getattr(read_settings({}, os.environ.keys()), name) != value
    monkeypatch.setenv(env_name(name), text)
    assert getattr(read_settings({}, os.environ.keys()), name) == value


@pytest.mark.parametrize("name", NAMES)
def test_the_command_line_is_over_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    default = read_settings({}, ())
    monkeypatch.setenv(env_name(name), EXAMPLES[name][0])
    given = getattr(default, name)
    if given is not None:
        assert getattr(read_settings({name: given if isinstance(given, bool) else str(given)}, ()), name) == given


def parsed(*arguments: str) -> Settings:
    """The settings of `dense-reward serve` with these arguments."""
    options: argparse.Namespace = parser().parse_args(["serve", *arguments])
    return read_settings({k: v for k, v in vars(options).items() if k in Settings.model_fields}, ())


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_has_its_flag(name: str) -> None:
    text, value = EXAMPLES[name]
    arguments = [flag(name), text]
    if isinstance(value, bool):
        arguments = [flag(name) if value else flag(name).replace("--", "--no-", 1)]
    assert getattr(parsed(*arguments), name) == value


def test_a_switch_can_be_turned_off_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DENSE_REWARD_ALLOW_UNRELATED", "1")
    assert parsed().allow_unrelated
    assert not parsed("--no-allow-unrelated").allow_unrelated


BAD = {
    "port": "70000",
    "threads": "0",
    "dtype": "int8",
    "max_batch_tokens": "-1",
    "max_items": "1000000",
    "drain_s": "soon",
    "allow_unrelated": "maybe",
    "log_level": "loud",
    "engine": "steam",
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_in_the_environment_is_refused_in_one_line_that_names_it(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(env_name(name), BAD[name])
    assert main(["serve"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"dense-reward: {flag(name)} ({env_name(name)}): ")


@pytest.mark.parametrize("name", ["port", "threads", "dtype", "max_batch_tokens", "max_items", "drain_s"])
def test_a_bad_value_on_the_command_line_is_refused_likewise(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", f"{flag(name)}={BAD[name]}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"dense-reward: {flag(name)} ({env_name(name)}): ")


def test_every_fault_is_reported_together(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DENSE_REWARD_PROT", "80")
    assert main(["serve", "--port=x", "--threads=0"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


@pytest.mark.parametrize("arguments", [["--max-queue", "5"], ["--engine", "steam"], ["--colour"]])
def test_a_flag_or_choice_that_does_not_exist_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", *arguments])
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("DENSE_REWARD_MAX_BATCH_TOKEN", "did you mean DENSE_REWARD_MAX_BATCH_TOKENS?"),
        ("dense_reward_prot", "did you mean DENSE_REWARD_PORT?"),
        ("DENSE_REWARD_SERVICE_PORT_HTTP_TCP", "enableServiceLinks: false"),
    ],
)
def test_an_unknown_environment_variable_is_refused_and_not_ignored(name: str, advice: str) -> None:
    with pytest.raises(SettingsError) as refused:
        read_settings({}, [name, "PATH", "DENSE_REWARDING"])
    assert str(refused.value).startswith(f"the environment variable {name} is not a setting: ")
    assert advice in str(refused.value)
    assert "DENSE_REWARDING" not in str(refused.value)


def test_settings_cannot_be_changed_once_read() -> None:
    with pytest.raises(ValueError, match="frozen"):
        read_settings({}, ()).port = 1
