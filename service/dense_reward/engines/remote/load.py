"""Loads and verifies a pair in another inference engine: vLLM in this process, or servers over HTTP."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import numpy as np

from dense_reward.engines.proof import (
    ROLES,
    Checkpoint,
    encoder_of,
    pair_info,
    probe_trunks,
    report_template,
    rms,
    stored_logprobs,
    tokenizer_of,
    verify_probe,
)
from dense_reward.engines.remote.addresses import FOLLOWED
from dense_reward.engines.remote.event_loop import BackgroundLoop
from dense_reward.engines.remote.lora import refuse_output_layer
from dense_reward.engines.remote.pair import Query, RemoteModel, RemotePair, close_models, gather_or_cancel, query_of
from dense_reward.engines.remote.replicas import Replica, ReplicatedModel, ServerAccess, UnreachableError
from dense_reward.engines.weight_files import check_files, check_names
from dense_reward.errors import CheckpointError, SequenceError, SettingsError
from dense_reward.folders import is_folder
from dense_reward.manifest import adapter_base_folder, check_pair, files_folder, load_manifest, verify_files
from dense_reward.records import FloatArray, Report
from dense_reward.settings import Settings
from dense_reward.text.encode import Encoder

PROBE_COPIES = 3
"""Copies of the probe sent concurrently, to check that results do not depend on batch mates."""
WRONG_MODEL_CURE = "it may serve another checkpoint; serve it in float32 to distinguish rounding from another model"
RETRY_START_EVERY_S = 2.0
SCHEMES = frozenset({"http", "https", f"{FOLLOWED}http"})
"""Not followed by https: a certificate is not for an address."""
QUANTITIES = frozenset({"candidate_reward"})
LoadedParts = tuple[RemotePair, Encoder, str]
"""Engine, encoder, and hash of the tokenizer."""


class LogprobSource(Protocol):
    """A model, or a replica of one."""

    async def logprobs(self, query: Query) -> FloatArray: ...


class IdentifiedModel(RemoteModel, Protocol):
    """A model whose limits are known: it was identified."""

    @property
    def max_length_tokens(self) -> int: ...

    @property
    def scores_candidates(self) -> bool: ...


@dataclass(slots=True)
class PendingPair:
    """A pair that is being loaded: its checkpoints, whether they come from one run, and the models started so far."""

    checkpoints: Sequence[Checkpoint]
    related: bool
    loop: BackgroundLoop
    models: list[IdentifiedModel] = field(default_factory=list)

    def other(self, checkpoint: Checkpoint) -> Checkpoint:
        """The other checkpoint of the pair."""
        sft, reference = self.checkpoints
        return reference if checkpoint is sft else sft


def load_remote(settings: Settings, report: Report) -> LoadedParts:
    """Load a pair on servers. Waits until a server of each model is up. Raises CheckpointError, SettingsError."""
    url_lists = _server_urls("--sft-url", settings.sft_url), _server_urls("--reference-url", settings.reference_url)
    names = settings.sft_served, settings.reference_served
    key = _read_key(settings.engine_key_file)
    with _pending_pair(settings) as pending:
        for checkpoint in pending.checkpoints:
            if checkpoint.manifest.adapter_base is not None:
                refuse_output_layer(files_folder(checkpoint.folder, checkpoint.manifest))
        for checkpoint, urls, served in zip(pending.checkpoints, url_lists, names, strict=True):
            access = ServerAccess(served, key, settings.max_request_s, checkpoint.manifest.vocabulary)
            model = _replicated_model(checkpoint, pending.other(checkpoint), urls, access)
            pending.models.append(model)
            _start_when_up(pending.loop, model, report)
        return _loaded_parts(pending, settings, ["remote", *names], report)


def load_vllm(settings: Settings, report: Report) -> LoadedParts:
    """Load a pair into vLLM in this process. Raises CheckpointError, SettingsError."""
    try:
        from dense_reward.engines.remote import vllm as vllm_engine  # noqa: PLC0415 - an optional library
    except ImportError as error:
        cure = "pip install '.[vllm]' in the project's folder"
        raise CheckpointError(f"vLLM cannot be imported ({error}): {cure}") from error
    with _pending_pair(settings) as pending:
        for checkpoint in pending.checkpoints:
            report(f"verifying the files of {checkpoint.role} ({checkpoint.folder})")
            verify_files(checkpoint.folder, checkpoint.manifest)
        weights = [vllm_engine.weights_of(each.folder, each.manifest, each.dtype) for each in pending.checkpoints]

        async def start() -> None:
            models = vllm_engine.start(weights[0], weights[1], vllm_engine.vllm_options(settings))
            pending.models += models
            for model, checkpoint in zip(models, pending.checkpoints, strict=True):
                await model.identify(probe_queries(checkpoint)[0])
                source = {f"{checkpoint.role} in vLLM": model}
                await verify_sources(source, checkpoint, pending.other(checkpoint), report)

        report(f"loading both models into vLLM {vllm_engine.VERSION}")
        pending.loop.run(start())
        version_and_options = ["vllm", vllm_engine.VERSION, settings.vllm_options, settings.tensor_parallel]
        return _loaded_parts(pending, settings, version_and_options, report)


async def verify_sources(
    sources: Mapping[str, LogprobSource], checkpoint: Checkpoint, other: Checkpoint, report: Report
) -> None:
    """Compare each source's log-probs with the stored probe and with those of the other sources.

    Raises CheckpointError if they differ by more than the tolerance, or are closer to the `other` checkpoint's probe.
    """
    queries, stored_S = probe_queries(checkpoint), stored_logprobs(checkpoint.manifest)
    calls = [source.logprobs(query) for source in sources.values() for _ in range(PROBE_COPIES) for query in queries]
    try:
        served = np.concatenate([values_TK[:, 0] for values_TK in await gather_or_cancel(calls)])
    except SequenceError as error:
        raise CheckpointError(f"the probe of {checkpoint.role} is refused: {error}") from error
    copies_of = dict(zip(sources, served.reshape(len(sources), PROBE_COPIES, -1), strict=True))
    for name, copies in copies_of.items():
        differences = [rms(copy_S - stored_S) for copy_S in copies]
        worst = int(np.argmax(differences))  # NaN counts as the largest
        verify_probe(name, copies[worst], checkpoint, cure=lambda: WRONG_MODEL_CURE, report=report)
        if (
            _probes_equal(checkpoint, other)
            and 2 * rms(copies[0] - stored_logprobs(other.manifest)) < differences[worst]
        ):
            raise CheckpointError(
                f"{name} computes the other checkpoint, not {checkpoint.role}: are the two exchanged?"
            )
    for (one, copies), (another, others) in combinations(copies_of.items(), 2):
        apart, tolerance = rms(copies[0] - others[0]), checkpoint.tolerance
        if not apart <= tolerance:
            raise CheckpointError(
                f"{one} and {another} disagree by {apart:.3g} nats (rms, at most {tolerance}): "
                "serve both with the same options"
            )


@contextmanager
def _pending_pair(settings: Settings) -> Iterator[PendingPair]:
    """Check the settings and manifests. If the block fails, close the models that it started."""
    if settings.sft is None or settings.reference is None:
        raise CheckpointError("give both checkpoints, for tokenizer and probes: --sft DIR --reference DIR")
    torch_only = ("deterministic", "head_dtype", "norm_dtype")
    if refused := [f"--{name.replace('_', '-')}" for name in torch_only if getattr(settings, name)]:
        raise SettingsError(f"only --engine torch accepts {', '.join(refused)}; see docs/engines.md for those of vLLM")
    folders = settings.sft, settings.reference
    manifests = load_manifest(folders[0]), load_manifest(folders[1])
    related = check_pair(*manifests, allow_unrelated=settings.allow_unrelated)
    checkpoints = [
        Checkpoint(role, folder, manifest, settings.dtype or manifest.dtype)
        for role, folder, manifest in zip(ROLES, folders, manifests, strict=True)
    ]
    for checkpoint in checkpoints:
        _check_present_files(checkpoint)
    pending = PendingPair(checkpoints, related, BackgroundLoop("engine"))
    try:
        yield pending
    except BaseException:
        close_models(pending.models, pending.loop)
        raise


def _check_present_files(checkpoint: Checkpoint) -> None:
    """Verify what is on this machine of a model that is computed elsewhere: the weights themselves need not be.

    Raises CheckpointError for broken files, and for weights that are not those of config.json.
    """
    folders: list[Path | None] = [files_folder(checkpoint.folder, checkpoint.manifest)]
    with suppress(CheckpointError):  # an adapter's base can be where the model is served
        folders.append(adapter_base_folder(checkpoint.folder, checkpoint.manifest))
    for folder in folders:
        if folder is not None and is_folder(folder):
            check_files(folder)
            check_names(folder)


def _loaded_parts(
    pending: PendingPair, settings: Settings, engine: Sequence[str | int | None], report: Report
) -> LoadedParts:
    """`engine`: its name, then the options that scores depend on; they become part of the revision."""
    sft = pending.checkpoints[0]
    manifest, models = sft.manifest, pending.models
    tokenizer = tokenizer_of(sft.folder, sft.manifest)
    info = pair_info(
        pending.checkpoints,
        options=engine,
        device=str(engine[0]),
        vocab_size=min(manifest.vocabulary, tokenizer.vocab_size),
        max_length_tokens=min(settings.max_batch_tokens, *(model.max_length_tokens for model in models)),
        quantities=QUANTITIES if all(model.scores_candidates for model in models) else frozenset(),
        related=pending.related,
    )
    encoder = encoder_of(tokenizer, manifest, sft.folder)
    report_template(encoder, tokenizer, manifest, report)
    return RemotePair(models[0], models[1], info, pending.loop), encoder, manifest.tokenizer_sha256


def _server_urls(flag: str, value: str | None) -> list[str]:
    """Raises SettingsError."""
    urls = [url.strip() for url in (value or "").split(",")]
    for url in urls:
        if "@" in url:
            raise SettingsError(f"{flag} holds a password, which logs would show: use --engine-key-file FILE instead")
        try:
            address = urlsplit(url)
            is_server = address.scheme in SCHEMES and address.hostname and address.port != 0
        except ValueError:
            is_server = False
        if not is_server or address.path not in {"", "/"}:
            raise SettingsError(
                f"{flag} takes URLs of servers without a path, as http://HOST:8001,http://HOST:8011, or of all servers "
                f"that a name resolves to, as dns+http://NAME:8000: {url!r} is not one"
            )
    return urls


def _read_key(file: Path | None) -> str | None:
    """Raises SettingsError."""
    try:
        return None if file is None else file.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--engine-key-file cannot be read: {error}") from None


def _replicated_model(
    checkpoint: Checkpoint, other: Checkpoint, urls: Sequence[str], access: ServerAccess
) -> ReplicatedModel:
    async def verify(replicas: Sequence[Replica], report: Report) -> None:
        sources = {f"{checkpoint.role} at {replica.url}": replica for replica in replicas}
        await verify_sources(sources, checkpoint, other, report)

    return ReplicatedModel(urls, access, probe_queries(checkpoint)[0], verify)


def _start_when_up(loop: BackgroundLoop, model: ReplicatedModel, report: Report) -> None:
    """Start the model; if no server is up, retry: they take minutes to start. Raises CheckpointError."""
    while True:
        try:
            loop.run(model.start(report))
        except UnreachableError as error:
            report(f"waiting for a server: {error}")
            time.sleep(RETRY_START_EVERY_S)
        else:
            return


def probe_queries(checkpoint: Checkpoint) -> list[Query]:
    """One query for each response of the probe."""
    trunks = probe_trunks(checkpoint.manifest)
    queries = [query_of(trunk, branch) for trunk in trunks for branch in trunk.branches]
    return [query for query in queries if query is not None]


def _probes_equal(checkpoint: Checkpoint, other: Checkpoint) -> bool:
    own_ids, other_ids = ([query.ids_L.tolist() for query in probe_queries(each)] for each in (checkpoint, other))
    return own_ids == other_ids
