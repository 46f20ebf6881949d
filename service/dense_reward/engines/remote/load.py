"""Settings -> a proven pair whose models vLLM computes in this process, or servers compute behind HTTP."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import numpy as np

from dense_reward.engines.remote.event_loop import BackgroundLoop
from dense_reward.engines.remote.lora import refuse_ends
from dense_reward.engines.remote.pair import ForeignModel, ForeignPair, Query, close, query_of, together
from dense_reward.engines.remote.replicas import Access, RemoteModel, Replica, UnreachableError
from dense_reward.engines.tokenizer import load_tokenizer
from dense_reward.engines.torch.load import PROBE_TOLERANCE_NATS, ROLES, Report, check_tokenizer, probe_trunks
from dense_reward.errors import CheckpointError, SequenceError, SettingsError
from dense_reward.manifest import Manifest, check_pair, files_folder, load_manifest, sha256_of_text, verify_files
from dense_reward.records import EngineInfo, FloatArray
from dense_reward.settings import Settings
from dense_reward.text.encode import Encoder

AT_ONCE = 3
"""So many copies of a probe are asked for at the same time: what stands beside a sequence must not change it."""
WAIT_S = 2.0
QUANTITIES = frozenset({"candidate_reward"})
Loaded = tuple[ForeignPair, Encoder, str]


class Answering(Protocol):
    """A model, or a replica of one."""

    async def logprobs(self, query: Query) -> FloatArray: ...


class Served(ForeignModel, Protocol):
    """A model that tells what it can do."""

    @property
    def max_length_tokens(self) -> int: ...

    @property
    def names_candidates(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One half of a pair, the other half's manifest, and the dtype that it is computed in."""

    role: str
    folder: Path
    manifest: Manifest
    other: Manifest
    dtype: str

    @property
    def queries(self) -> list[Query]:
        return _queries(self.manifest)


@dataclass(slots=True)
class Loading:
    """A pair on its way: both checkpoints, whether they are of one run, and what was begun for them."""

    checkpoints: Sequence[Checkpoint]
    related: bool
    loop: BackgroundLoop
    models: list[Served] = field(default_factory=list)


def load_remote(settings: Settings, report: Report) -> Loaded:
    """Engine, encoder, tokenizer hash of a pair on servers; waits for these. Raises CheckpointError, SettingsError."""
    addresses = _addresses("--sft-url", settings.sft_url), _addresses("--reference-url", settings.reference_url)
    names = settings.sft_served, settings.reference_served
    key = _key(settings.engine_key_file)
    with _loading(settings) as loading:
        for checkpoint in loading.checkpoints:
            if checkpoint.manifest.adapter_base is not None:
                refuse_ends(files_folder(checkpoint.folder, checkpoint.manifest))
        for checkpoint, urls, served in zip(loading.checkpoints, addresses, names, strict=True):
            access = Access(served, key, settings.max_request_s, checkpoint.manifest.vocabulary)
            model = _remote(checkpoint, urls, access)
            loading.models.append(model)
            _wait_for(loading.loop, model, report)
        return _pair(loading, settings, ["remote", *names])


def load_vllm(settings: Settings, report: Report) -> Loaded:
    """Engine, encoder and tokenizer hash of a pair in vLLM, in this process. Raises CheckpointError, SettingsError."""
    try:
        from dense_reward.engines.remote import vllm as vllm_engine  # noqa: PLC0415 - there where it is asked for
    except ImportError as error:
        raise CheckpointError(f"vLLM is not there ({error}): pip install 'dense-reward[vllm]'") from error
    with _loading(settings) as loading:
        for checkpoint in loading.checkpoints:
            report(f"verifying the files of {checkpoint.role} ({checkpoint.folder})")
            verify_files(checkpoint.folder, checkpoint.manifest)
        weights = [vllm_engine.weights_of(each.folder, each.manifest, each.dtype) for each in loading.checkpoints]

        async def start() -> None:
            models = vllm_engine.start(weights[0], weights[1], vllm_engine.serving_of(settings))
            loading.models += models
            for model, checkpoint in zip(models, loading.checkpoints, strict=True):
                await model.identify(checkpoint.queries[0])
                await prove({f"{checkpoint.role} in vLLM": model}, checkpoint, report)

        report(f"loading both models into vLLM {vllm_engine.VERSION}")
        loading.loop.run(start())
        return _pair(loading, settings, ["vllm", vllm_engine.VERSION, settings.vllm_options, settings.tensor_parallel])


async def prove(answering: Mapping[str, Answering], checkpoint: Checkpoint, report: Report) -> None:
    """Compare log-probs with the stored probe, and replicas with each other. Raises CheckpointError on disagreement."""
    stored, queries = _stored(checkpoint.manifest), checkpoint.queries
    tolerance = PROBE_TOLERANCE_NATS[checkpoint.dtype]
    asked = [model.logprobs(query) for model in answering.values() for _ in range(AT_ONCE) for query in queries]
    try:
        answers = np.concatenate([values_TK[:, 0] for values_TK in await together(asked)])
    except SequenceError as error:
        raise CheckpointError(f"the probe of {checkpoint.role} is refused: {error}") from error
    found = dict(zip(answering, answers.reshape(len(answering), AT_ONCE, -1), strict=True))
    for name, copies in found.items():
        worst = max(_rms(copy - stored) for copy in copies)
        report(f"probe of {name}: rms difference {worst:.2g} nats over {len(stored)} tokens (at most {tolerance})")
        if not worst <= tolerance:
            raise CheckpointError(
                f"{name} is computed wrong, or is another checkpoint: its log-probs differ from the stored probe of "
                f"{checkpoint.role} by {worst:.3g} nats (rms, at most {tolerance} in {checkpoint.dtype})"
            )
        if _probes_alike(checkpoint) and 2 * _rms(copies[0] - _stored(checkpoint.other)) < worst:
            raise CheckpointError(
                f"{name} computes the other checkpoint, not {checkpoint.role}: are the two exchanged?"
            )
    for (one, copies), (other, others) in combinations(found.items(), 2):
        apart = _rms(copies[0] - others[0])
        if not apart <= tolerance:
            raise CheckpointError(f"{one} and {other} disagree by {apart:.3g} nats (rms, at most {tolerance})")


@contextmanager
def _loading(settings: Settings) -> Iterator[Loading]:
    """What is begun in the block is ended where it fails."""
    if settings.sft is None or settings.reference is None:
        raise CheckpointError("give both checkpoints, for tokenizer and probes: --sft DIR --reference DIR")
    of_torch = ("deterministic", "head_dtype", "norm_dtype")
    if ignored := [f"--{name.replace('_', '-')}" for name in of_torch if getattr(settings, name)]:
        raise SettingsError(
            f"{', '.join(ignored)} is of --engine torch alone; docs/engines.md tells of vLLM's own ways"
        )
    folders = settings.sft, settings.reference
    manifests = load_manifest(folders[0]), load_manifest(folders[1])
    related = check_pair(*manifests, allow_unrelated=settings.allow_unrelated)
    checkpoints = [
        Checkpoint(role, folder, own, other, settings.dtype or own.dtype)
        for role, folder, own, other in zip(ROLES, folders, manifests, manifests[::-1], strict=True)
    ]
    loading = Loading(checkpoints, related, BackgroundLoop("engine"))
    try:
        yield loading
    except BaseException:
        close(loading.models, loading.loop)
        raise


def _pair(loading: Loading, settings: Settings, engine: Sequence[str | int | None]) -> Loaded:
    sft, reference = loading.checkpoints
    manifest, models = sft.manifest, loading.models
    tokenizer = load_tokenizer(files_folder(sft.folder, manifest))
    check_tokenizer(tokenizer, manifest, sft.folder)
    facts = [
        [each.manifest.content_sha256, each.dtype, each.manifest.renderer, each.manifest.end_of_turn_id]
        for each in loading.checkpoints
    ]
    info = EngineInfo(
        sft=str(sft.folder),
        reference=str(reference.folder),
        revision=sha256_of_text(json.dumps([*facts, engine]))[:16],
        dtype=sft.dtype,
        device=str(engine[0]),
        vocabulary=min(manifest.vocabulary, tokenizer.vocabulary),
        max_length_tokens=min(settings.max_batch_tokens, *(model.max_length_tokens for model in models)),
        quantities=QUANTITIES if all(model.names_candidates for model in models) else frozenset(),
        related=loading.related,
    )
    encoder = Encoder(tokenizer, manifest.renderer, manifest.end_of_turn_id)
    return ForeignPair(models[0], models[1], info, loading.loop), encoder, manifest.tokenizer_sha256


def _addresses(flag: str, listed: str | None) -> list[str]:
    """Raises SettingsError."""
    urls = [url.strip() for url in (listed or "").split(",")]
    for url in urls:
        if "@" in url:
            raise SettingsError(f"{flag} holds a password, which logs would show: --engine-key-file FILE instead")
        try:
            address = urlsplit(url)
            is_server = address.scheme in {"http", "https"} and address.hostname and address.port != 0
        except ValueError:
            is_server = False
        if not is_server or address.path not in {"", "/"}:
            raise SettingsError(
                f"{flag} names servers, as http://HOST:8001,http://HOST:8011, without a path: {url!r} is none"
            )
    return urls


def _key(file: Path | None) -> str | None:
    """Raises SettingsError."""
    try:
        return None if file is None else file.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--engine-key-file cannot be read: {error}") from None


def _remote(checkpoint: Checkpoint, urls: Sequence[str], access: Access) -> RemoteModel:
    replicas = [Replica(url, access) for url in urls]

    async def proven(replicas: Sequence[Replica], report: Report) -> None:
        await prove({f"{checkpoint.role} at {replica.url}": replica for replica in replicas}, checkpoint, report)

    return RemoteModel(replicas, checkpoint.queries[0], proven, access.timeout_s)


def _wait_for(loop: BackgroundLoop, model: RemoteModel, report: Report) -> None:
    """Servers take minutes to start, and may be started after this one. Raises CheckpointError."""
    while True:
        try:
            loop.run(model.start(report))
        except UnreachableError as error:
            report(f"waiting for a server: {error}")
            time.sleep(WAIT_S)
        else:
            return


def _stored(manifest: Manifest) -> FloatArray:
    """The log-probs of a probe, one response's after another's."""
    stored = [response.logprobs for sequence in manifest.probe for response in sequence.responses]
    if not any(stored):
        raise CheckpointError(f"the manifest of {manifest.role} has an empty probe: adopt the checkpoint anew")
    return np.concatenate([np.array(logprobs, dtype=np.float32) for logprobs in stored])


def _queries(manifest: Manifest) -> list[Query]:
    asked = [query_of(trunk, branch) for trunk in probe_trunks(manifest) for branch in trunk.branches]
    return [query for query in asked if query is not None]


def _probes_alike(checkpoint: Checkpoint) -> bool:
    own, other = _queries(checkpoint.manifest), _queries(checkpoint.other)
    return [query.ids_L.tolist() for query in own] == [query.ids_L.tolist() for query in other]


def _rms(difference_S: FloatArray) -> float:
    return float(np.sqrt(np.mean(difference_S**2)))
