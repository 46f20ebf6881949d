"""Every knob of the service once: name, default, unit, environment twin (DENSE_REWARD_ + NAME) and help.

The command line is made from this class, so a knob cannot exist in one place only. Imports nothing heavy.
"""

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal, Protocol, TypeVar

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from dense_reward.errors import SettingsError
from dense_reward.schemas import MAX_ITEMS
from dense_reward.telemetry.logs import LogFormat

ENV_PREFIX = "DENSE_REWARD_"
Dtype = Literal["float32", "bfloat16", "float16", "float64"]
EngineName = Literal["torch", "vllm", "remote", "fake"]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(BaseSettings):
    """Parsed before anything heavy is imported. Command line over environment over default."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    sft: Path | None = Field(None, description="folder of the finished SFT checkpoint")
    reference: Path | None = Field(None, description="folder of the earlier checkpoint of the same run")
    name: str = Field("default", description="name under which the pair is served")
    pairs_file: Path | None = Field(
        None, description="JSON list of pairs, each with name, sft and reference, in place of --sft and --reference"
    )
    checkpoints_folder: Path | None = Field(
        None, description="folder in which every checkpoint must lie, bases of adapters too; needed by /admin/models"
    )
    engine: EngineName = Field(
        "torch", description="vllm: in this process; remote: servers of vLLM or SGLang; fake: weightless, for tests"
    )
    sft_url: str | None = Field(None, description="engine remote: servers of the sft model, divided by commas")
    reference_url: str | None = Field(None, description="engine remote: servers of the reference, divided by commas")
    sft_served: str | None = Field(None, description="name of the sft model on its servers; their first where left out")
    reference_served: str | None = Field(None, description="name of the reference on its servers, as --sft-served")
    engine_key_file: Path | None = Field(None, description="file with the key that these servers ask for")
    tensor_parallel: PositiveInt = Field(1, description="engine vllm: GPUs that share each model")
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="engine vllm: share of a GPU's memory for each model; 0.42, or 0.9 on GPUs of their own"
    )
    vllm_options: str | None = Field(
        None, description="engine vllm: JSON object of its other engine arguments, such as quantization"
    )
    dtype: Dtype | None = Field(
        None, description="dtype of the weights; the checkpoint's own where left out, float32 where a CPU lacks it"
    )
    head_dtype: Dtype | None = Field(
        None, description="dtype of the output layers alone; float32 lowers the noise of rewards from short weights"
    )
    norm_dtype: Dtype | None = Field(None, description="dtype in which norms multiply by their weights, as head_dtype")
    deterministic: bool = Field(
        False, description="the same rewards to the bit whatever else is asked: each sequence is computed alone, slower"
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1, ...; auto takes the first GPU where there is one")
    reference_device: str | None = Field(None, description="device of the reference; that of sft where left out")
    threads: PositiveInt | None = Field(None, description="CPU threads for the models; all cores where left out")
    allow_unrelated: bool = Field(False, description="serve two checkpoints that are not from one run")
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="port to listen on; 0 takes a free one")
    api_keys_file: Path | None = Field(
        None, description="JSON list of keys, each with name, key and rights; read again when it changes"
    )
    open_metrics: bool = Field(False, description="answer /metrics without a key")
    tls_certificate: Path | None = Field(None, description="PEM file with the certificate chain; https only, then")
    tls_private_key: Path | None = Field(None, description="PEM file with the private key of the certificate")
    max_batch_tokens: PositiveInt = Field(
        16_384, description="tokens computed at once; also the longest sequence, and what bounds a batch's memory"
    )
    max_queue_tokens: PositiveInt = Field(
        1_048_576, description="tokens that may wait, and one request more; beyond that callers get 429"
    )
    max_length_tokens: PositiveInt | None = Field(
        None, description="tokens of prompt and response together; the model's own limit where left out"
    )
    max_body_bytes: PositiveInt = Field(64 * 1024 * 1024, description="size of a request's body in bytes")
    max_json_depth: PositiveInt = Field(64, description="how deep tools, template_kwargs and tool_calls may be nested")
    max_items: Annotated[int, Field(gt=0, le=MAX_ITEMS)] = Field(4096, description="items of a request")
    max_responses: PositiveInt = Field(4096, description="responses of one item")
    max_heatmap_tokens: PositiveInt = Field(
        20_000, description="tokens of a drawn heatmap, a prompt counted with each of its responses"
    )
    max_arrival_s: PositiveSeconds = Field(
        30.0, description="seconds that the head of a request may take to arrive, and then its body"
    )
    max_request_s: PositiveSeconds = Field(
        600.0, description="seconds until a request is given up; its caller may ask for fewer by X-Request-Timeout"
    )
    results_bytes: Annotated[int, Field(ge=0)] = Field(
        0, description="memory in bytes for scores that may be asked for again; 0 keeps none"
    )
    isolate_keys: bool = Field(
        False, description="share prompts and results within a key alone, so that no time tells what others ask"
    )
    drain_s: PositiveInt = Field(60, description="seconds that requests in flight may take after SIGTERM")
    log_format: LogFormat = Field("text", description="lines for people, or one JSON object a line")
    otlp_endpoint: str | None = Field(
        None, description="address of an OpenTelemetry receiver (OTLP over HTTP, http://collector:4318) for spans"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")


def flag(name: str) -> str:
    """A setting's name on the command line."""
    return "--" + name.replace("_", "-")


def env_name(name: str) -> str:
    """A setting's name in the environment."""
    return ENV_PREFIX + name.upper()


def read_settings(given: Mapping[str, str | bool], environment: Collection[str]) -> Settings:
    """The settings that a command line gives, over the environment's, over the defaults.

    Raises SettingsError, a line for each fault, also where `environment` (its names) holds a twin of no setting.
    """
    faults = _unknown_variables(environment)
    try:
        settings = Settings(**given)  # type: ignore[arg-type] # pydantic turns words into numbers and paths
    except ValidationError as error:
        faults += [_fault(str(detail["loc"][0]), detail["msg"]) for detail in error.errors()]
    if faults:
        raise SettingsError("\n".join(faults))
    return settings


def _fault(name: str, message: str) -> str:
    return f"{flag(name)} ({env_name(name)}): {message}"


def _unknown_variables(environment: Collection[str]) -> list[str]:
    faults = []
    for name in sorted(environment):
        setting = name.upper().removeprefix(ENV_PREFIX).lower()
        if name.upper().startswith(ENV_PREFIX) and setting not in Settings.model_fields:
            near = get_close_matches(setting, Settings.model_fields, n=1)
            advice = (
                f"did you mean {env_name(near[0])}?" if near else "unset it (in Kubernetes: enableServiceLinks: false)"
            )
            faults.append(f"{name} in the environment is no setting: {advice}")
    return faults


class _WithName(Protocol):
    @property
    def name(self) -> str: ...


Entry = TypeVar("Entry", bound=_WithName)


def read_list(setting: str, file: Path, entries: TypeAdapter[list[Entry]]) -> list[Entry]:
    """The entries of a setting's file, a JSON list in which no two names are equal.

    Raises SettingsError, naming the setting, the file and the place; it never repeats content, which can be secret.
    """
    where = f"{setting} {file}"
    try:
        found = entries.validate_json(file.read_bytes())
    except OSError as error:
        raise SettingsError(f"{where}: {error.strerror}") from None
    except ValidationError as error:
        detail = error.errors(include_input=False, include_url=False, include_context=False)[0]
        place = ".".join(map(str, detail["loc"])) or "the file"
        raise SettingsError(f"{where}: {place}: {detail['msg']}") from None
    if len({entry.name for entry in found}) < len(found):
        raise SettingsError(f"{where}: two entries have the same name")
    return found
