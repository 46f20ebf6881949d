"""Every setting of the service: name, type, default and help text. Imports nothing heavy.

The flags of the command line and the environment variables (DENSE_REWARD_ + NAME) are both derived from `Settings`.
"""

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal, Protocol, TypeVar

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from dense_reward.errors import SettingsError
from dense_reward.limits import MAX_ITEMS
from dense_reward.telemetry.log_format import LogFormat
from dense_reward.waits import DRAIN_S, MAX_QUEUE_TOKENS, MAX_REQUEST_S

ENV_PREFIX = "DENSE_REWARD_"
Dtype = Literal["float32", "bfloat16", "float16", "float64"]
EngineName = Literal["torch", "vllm", "remote", "fake"]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(BaseSettings):
    """The command line overrides the environment, which overrides the defaults. Units are in the names."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    sft: Path | None = Field(None, description="folder of the finished SFT checkpoint")
    reference: Path | None = Field(None, description="folder of the earlier checkpoint of the same run")
    token_head: Path | None = Field(
        None,
        description="folder of a token head: its value after each token is the reward; replaces --sft and --reference",
    )
    name: str = Field("default", description="name of the pair or token head in requests, answers and metrics")
    pairs_file: Path | None = Field(
        None,
        description="JSON list of pairs, each with name, sft and reference, and of token heads, with name and "
        "token_head; replaces --sft and --reference",
    )
    run: Path | None = Field(
        None,
        description="folder of a finished SFT run: a pair for each of its references, named after the reference's "
        "folder, the earliest first; replaces --sft and --reference",
    )
    checkpoints_folder: Path | None = Field(
        None,
        description="load checkpoints, and the base models of adapters, only from below this folder; required for "
        "loading pairs through /admin/models",
    )
    engine: EngineName = Field(
        "torch",
        description="torch: models run in this process; vllm: they run in vLLM, started by this process; remote: on "
        "vLLM or SGLang servers; fake: no models, for tests",
    )
    sft_url: str | None = Field(
        None,
        description="engine remote: URLs of the servers of the sft model, separated by commas; dns+http://NAME:8000 is "
        "all servers that the name resolves to, now and later",
    )
    reference_url: str | None = Field(
        None, description="engine remote: URLs of the servers of the reference, as for the sft model"
    )
    sft_served: str | None = Field(
        None, description="engine remote: name of the sft model on its servers; if left out, the first that they list"
    )
    reference_served: str | None = Field(
        None, description="engine remote: name of the reference on its servers; if left out, the first that they list"
    )
    engine_key_file: Path | None = Field(None, description="engine remote: file with the API key of the servers")
    tensor_parallel: PositiveInt = Field(1, description="engine vllm: number of GPUs for each model")
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="engine vllm: fraction of a GPU's memory for each vLLM engine; if left out, 0.42 if two engines "
        "share a GPU, else 0.9",
    )
    vllm_options: str | None = Field(
        None, description="engine vllm: JSON object of other vLLM engine arguments, such as quantization"
    )
    dtype: Dtype | None = Field(
        None,
        description="dtype of the weights; if left out, that of the checkpoint, or float32 if the CPU cannot compute "
        "in that",
    )
    head_dtype: Dtype | None = Field(
        None, description="dtype of the output layers only; float32 lowers the noise of rewards from 16-bit weights"
    )
    norm_dtype: Dtype | None = Field(
        None, description="dtype of the normalisation layers only; float32 lowers the noise like --head-dtype"
    )
    pack_weights: bool = Field(
        True,
        description="on a CPU, hold a second copy of weights for which that makes matmuls faster, if it takes at most "
        "half of the free memory; never with --deterministic",
    )
    compile_kernels: bool = Field(
        True,
        description="on a CPU with a C++ compiler, compile norms, rotary embeddings, gates and the softmax over the "
        "vocabulary at start, for models of at least ten million weights: 10 to 20 seconds at the first start of a "
        "user; never with --deterministic",
    )
    deterministic: bool = Field(
        False,
        description="compute each sequence alone, which is slower, so that its rewards are bitwise equal in any batch",
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1, ...; auto: the first GPU, or the CPU if there is none")
    reference_device: str | None = Field(None, description="device of the reference; if left out, that of sft")
    threads: PositiveInt | None = Field(None, description="CPU threads for the models; if left out, all cores")
    allow_unrelated: bool = Field(False, description="serve two checkpoints that do not come from one run")
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0: all addresses")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="port to listen on; 0: any free port")
    api_keys_file: Path | None = Field(
        None,
        description="JSON list of keys, each with name, key and rights; if given, requests need a key; changes need no "
        "restart",
    )
    open_metrics: bool = Field(False, description="answer /metrics without a key")
    tls_certificate: Path | None = Field(
        None, description="PEM file with the certificate chain; the service then answers https only"
    )
    tls_private_key: Path | None = Field(None, description="PEM file with the private key of the certificate")
    max_batch_tokens: PositiveInt = Field(
        16_384, description="maximum tokens in a batch; limits the memory of a batch and the length of a sequence"
    )
    max_queue_tokens: PositiveInt = Field(
        MAX_QUEUE_TOKENS,
        description="maximum tokens in the queue; a full queue refuses requests with 429; the last admitted request "
        "can exceed the limit",
    )
    max_length_tokens: PositiveInt | None = Field(
        None, description="maximum tokens of prompt and response together; if left out, the limit of the models"
    )
    max_body_bytes: PositiveInt = Field(
        4 * 1024 * 1024,
        description="maximum bytes of a request body, also after decompression; the default is 4 for each token of "
        "the default queue; a body may have a JSON value for each 8 of them, and a list or object for each 64",
    )
    max_json_depth: PositiveInt = Field(
        64, description="maximum nesting depth of JSON in tools, template_kwargs and tool_calls"
    )
    max_items: Annotated[int, Field(gt=0, le=MAX_ITEMS)] = Field(4096, description="maximum items in a request")
    max_responses: PositiveInt = Field(4096, description="maximum responses in one item")
    max_heatmap_tokens: PositiveInt = Field(
        20_000, description="maximum tokens in a drawn heatmap; a prompt counts once for each of its responses"
    )
    max_arrival_s: PositiveSeconds = Field(
        30.0,
        description="seconds allowed for the head of a request to arrive, then for its body; also for each pause "
        "of a caller while it reads its answer",
    )
    max_request_s: PositiveSeconds = Field(
        MAX_REQUEST_S,
        description="seconds after which a request is cancelled and answered with 504; the header X-Request-Timeout "
        "can lower it",
    )
    results_bytes: Annotated[int, Field(ge=0)] = Field(0, description="bytes of memory for caching scores; 0: no cache")
    isolate_keys: bool = Field(
        False,
        description="share prompts and cached scores only within a key, so that response times do not reveal what "
        "other keys score",
    )
    drain_s: PositiveInt = Field(DRAIN_S, description="seconds allowed for requests in flight after SIGTERM")
    log_format: LogFormat = Field("text", description="text: lines for people; json: one JSON object per line")
    otlp_endpoint: str | None = Field(
        None, description="URL of an OpenTelemetry receiver (OTLP over HTTP) for spans, such as http://collector:4318"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="minimum level that is logged")


def flag(name: str) -> str:
    """The flag of a setting on the command line."""
    return "--" + name.replace("_", "-")


def env_name(name: str) -> str:
    """The environment variable of a setting."""
    return ENV_PREFIX + name.upper()


def read_settings(given: Mapping[str, str | bool], environment: Collection[str]) -> Settings:
    """Settings from `given` (the command line), the environment and the defaults, in this order of priority.

    Raises SettingsError with a line for each fault. `environment` is the names of all environment variables: one that
    begins with ENV_PREFIX but belongs to no setting is a fault.
    """
    faults = _unknown_variables(environment)
    try:
        settings = Settings(**given)  # type: ignore[arg-type] # pydantic turns strings into numbers and paths
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
            faults.append(f"the environment variable {name} is not a setting: {advice}")
    return faults


class _WithName(Protocol):
    @property
    def name(self) -> str: ...


Entry = TypeVar("Entry", bound=_WithName)


def read_list(setting: str, file: Path, entries: TypeAdapter[list[Entry]]) -> list[Entry]:
    """The entries of a setting's file, which is a JSON list of objects with different names.

    Raises SettingsError with the setting, the file and the place in it. The error never repeats the content, which can
    be secret.
    """
    where = f"{setting} {file}"
    try:
        found = entries.validate_json(file.read_bytes())
    except OSError as error:
        cure = ": allow this user to read it" if isinstance(error, PermissionError) else ""
        raise SettingsError(f"{where}: {error.strerror}{cure}") from None
    except ValidationError as error:
        detail = error.errors(include_input=False, include_url=False, include_context=False)[0]
        place = ".".join(map(str, detail["loc"])) or "the file"
        raise SettingsError(f"{where}: {place}: {detail['msg']}") from None
    if len({entry.name for entry in found}) < len(found):
        raise SettingsError(f"{where}: two entries have the same name")
    return found
