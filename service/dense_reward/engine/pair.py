"""sft + reference: load both, prove that they make a pair and are computed right, score with both."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dense_reward.engine.base import Branch, EngineInfo, FloatArray, IdArray, TokenScores, Trunk, Wants
from dense_reward.engine.logprobs import ScoredRows, Side, score_rows
from dense_reward.engine.tokenizer import TransformersTokenizer, load_tokenizer
from dense_reward.engine.torch_engine import TorchModel, load_model
from dense_reward.errors import CheckpointError, OutOfMemoryError
from dense_reward.manifest import Manifest, check_pair, files_folder, load_manifest, sha256_of_text, verify_files

Report = Callable[[str], None]
QUANTITIES = frozenset({"kl", "centred", "entropy", "candidate_reward", "alternatives"})
# Root mean square of (served - stored) log-probs over the probe, in nats, above which a service does not start. Wrong
# attention or positions are wrong by more than 0.5; rounding is a tenth of each bound on the models that were tried.
PROBE_TOLERANCE_NATS = {"float64": 1e-3, "float32": 1e-3, "float16": 0.1, "bfloat16": 0.3}
CPU_OUT_OF_MEMORY = "DefaultCPUAllocator: "  # torch has a class of its own for the errors of devices alone


@dataclass(frozen=True, slots=True)
class _Sequence:
    """A prompt with one branch, and where its scores go."""

    trunk: int
    branch: int
    ids_L: IdArray
    positions_S: IdArray
    source: Branch


class PairEngine:
    """Both checkpoints on one device; padded batches of similar lengths."""

    def __init__(self, sft: TorchModel, reference: TorchModel, info: EngineInfo, *, max_batch_tokens: int) -> None:
        self._sft = sft
        self._reference = reference
        self._info = info
        self._max_batch_tokens = max_batch_tokens
        self._borders = frozenset(n for n in (sft.long_tokens, reference.long_tokens) if n is not None)

    @property
    def info(self) -> EngineInfo:
        return self._info

    def score(self, trunks: Sequence[Trunk], wants: Wants) -> list[list[TokenScores]]:
        try:
            return self._score(trunks, wants)
        except torch.OutOfMemoryError as error:
            reason = str(error)
        except RuntimeError as error:
            if CPU_OUT_OF_MEMORY not in str(error):
                raise
            reason = str(error)
        # Not from within `except`: the traceback there keeps every tensor of the batch alive.
        raise OutOfMemoryError(reason)

    def _score(self, trunks: Sequence[Trunk], wants: Wants) -> list[list[TokenScores]]:
        results: list[list[TokenScores | None]] = [[None] * len(trunk.branches) for trunk in trunks]
        for batch in _padded_batches(_sequences(trunks), self._max_batch_tokens, self._borders):
            for sequence, scores in zip(batch, self._score_batch(batch, wants), strict=True):
                results[sequence.trunk][sequence.branch] = scores
        return [[scores for scores in branches if scores is not None] for branches in results]

    @torch.inference_mode()
    def _score_batch(self, batch: Sequence[_Sequence], wants: Wants) -> list[TokenScores]:
        ids = [sequence.ids_L for sequence in batch]
        positions = [sequence.positions_S for sequence in batch]
        device = self._sft.device
        targets_N = torch.from_numpy(np.concatenate([s.ids_L[s.positions_S + 1] for s in batch])).long().to(device)
        scored = score_rows(
            Side(self._sft.rows(ids, positions), self._sft.head),
            Side(self._reference.rows(ids, positions), self._reference.head),
            targets_N,
            wants,
            _candidates(batch, device),
        )
        return _per_sequence(scored, batch)


def load_pair(
    sft: Path,
    reference: Path,
    *,
    dtype: str | None,
    device: str,
    max_batch_tokens: int,
    allow_unrelated: bool,
    report: Report,
) -> tuple[PairEngine, TransformersTokenizer, Manifest]:
    """Load two checkpoints, prove them, and return engine, tokenizer and the sft manifest.

    Raises CheckpointError, naming the cure, for anything that would make an answer wrong.
    """
    manifests = load_manifest(sft), load_manifest(reference)
    related = check_pair(*manifests, allow_unrelated=allow_unrelated)
    models = []
    for role, folder, manifest in zip(("sft", "reference"), (sft, reference), manifests, strict=True):
        report(f"verifying the files of {role} ({folder})")
        verify_files(folder, manifest)
        report(f"loading {role}")
        models.append(load_model(folder, manifest, dtype=dtype, device=device))
    tokenizer = load_tokenizer(files_folder(sft, manifests[0]))
    _check_tokenizer(tokenizer, manifests[0], sft)
    info = EngineInfo(
        sft=str(sft),
        reference=str(reference),
        revision=sha256_of_text(manifests[0].weights_sha256 + manifests[1].weights_sha256)[:16],
        dtype=dtype or manifests[0].dtype,
        device=device,
        vocabulary=min(models[0].vocabulary, tokenizer.vocabulary),
        max_length_tokens=min(model.max_length_tokens for model in models),
        quantities=QUANTITIES,
        related=related,
    )
    engine = PairEngine(models[0], models[1], info, max_batch_tokens=max_batch_tokens)
    prove(engine, *manifests, report=report)
    return engine, tokenizer, manifests[0]


def prove(engine: PairEngine, sft: Manifest, reference: Manifest, *, report: Report) -> None:
    """Compare the engine's log-probs with both stored probes. Raises CheckpointError on disagreement."""
    tolerance = PROBE_TOLERANCE_NATS[engine.info.dtype]
    for role, manifest in (("sft", sft), ("reference", reference)):
        trunks = [_probe_trunk(sequence.prompt_ids, [r.ids for r in sequence.responses]) for sequence in manifest.probe]
        stored = [response.logprobs for sequence in manifest.probe for response in sequence.responses]
        if not any(stored):
            raise CheckpointError(f"the manifest of {role} has an empty probe: adopt the checkpoint anew")
        served = [
            scores.sft_logprob_S if role == "sft" else scores.reference_logprob_S
            for branches in engine.score(trunks, Wants())
            for scores in branches
        ]
        difference = np.concatenate(served) - np.concatenate([np.array(x) for x in stored])
        rms = float(np.sqrt(np.mean(difference**2)))
        report(f"probe of {role}: rms difference {rms:.2g} nats over {len(difference)} tokens (at most {tolerance})")
        if not rms <= tolerance:
            raise CheckpointError(
                f"{role} is computed wrong: its log-probs differ from the stored probe by {rms:.3g} nats (rms, at most "
                f"{tolerance} in {engine.info.dtype}): serve it with --dtype float32 to tell rounding from a wrong path"
            )


def _probe_trunk(prompt_ids: Sequence[int], responses: Sequence[Sequence[int]]) -> Trunk:
    branches = tuple(Branch(np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=bool)) for ids in responses)
    return Trunk(np.array(prompt_ids, dtype=np.int32), branches)


def _check_tokenizer(tokenizer: TransformersTokenizer, manifest: Manifest, folder: Path) -> None:
    if tokenizer.sha256() != manifest.tokenizer_sha256:
        raise CheckpointError(f"{folder}: its tokenizer is not the one of its manifest: adopt the checkpoint anew")
    if tokenizer.template_sha256(manifest.renderer) != manifest.template_sha256:
        raise CheckpointError(f"{folder}: its chat template is not the one of its manifest: adopt the checkpoint anew")


def _sequences(trunks: Sequence[Trunk]) -> list[_Sequence]:
    """Every branch with its prompt; the row that predicts a token is the one before it."""
    return [
        _Sequence(
            t,
            b,
            np.concatenate([trunk.prompt_P, branch.ids_T]),
            (np.flatnonzero(branch.scored_T) + len(trunk.prompt_P) - 1).astype(np.int32),
            branch,
        )
        for t, trunk in enumerate(trunks)
        for b, branch in enumerate(trunk.branches)
    ]


def _padded_batches(
    sequences: Sequence[_Sequence], max_tokens: int, borders: Collection[int]
) -> Iterator[list[_Sequence]]:
    """Sequences of similar length together; at most `max_tokens` after padding, or one sequence alone.

    No batch holds lengths on both sides of a border.
    """
    batch: list[_Sequence] = []
    for sequence in sorted(sequences, key=lambda s: len(s.ids_L)):
        length = len(sequence.ids_L)
        crosses = batch and any(len(batch[0].ids_L) <= border < length for border in borders)
        if batch and (crosses or (len(batch) + 1) * length > max_tokens):
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch


def _candidates(batch: Sequence[_Sequence], device: torch.device) -> Tensor | None:
    """Candidates of all rows, [N, K], filled up with id 0 where a branch names fewer."""
    width = max((s.source.candidates_SK.shape[1] for s in batch if s.source.candidates_SK is not None), default=0)
    if width == 0:
        return None
    blocks = []
    for sequence in batch:
        block = np.zeros((len(sequence.positions_S), width), dtype=np.int64)
        if sequence.source.candidates_SK is not None:
            block[:, : sequence.source.candidates_SK.shape[1]] = sequence.source.candidates_SK
        blocks.append(block)
    return torch.from_numpy(np.concatenate(blocks)).to(device)


def _per_sequence(scored: ScoredRows, batch: Sequence[_Sequence]) -> list[TokenScores]:
    """Cut the rows of a batch at its sequences; float32 and int32 on the host."""
    results, start = [], 0
    for sequence in batch:
        part = slice(start, start + len(sequence.positions_S))
        start = part.stop
        candidates = sequence.source.candidates_SK
        width = 0 if candidates is None else candidates.shape[1]
        results.append(
            TokenScores(
                sft_logprob_S=scored.sft_logprob_N[part].float().cpu().numpy(),
                reference_logprob_S=scored.reference_logprob_N[part].float().cpu().numpy(),
                kl_S=_floats(scored.kl_N, part),
                entropy_S=_floats(scored.entropy_N, part),
                candidate_reward_SK=None if width == 0 else _floats(scored.candidate_reward_NK, part, width),
                top_ids_SK=None if scored.top_ids_NK is None else scored.top_ids_NK[part].int().cpu().numpy(),
                top_sft_logprob_SK=_floats(scored.top_sft_logprob_NK, part),
                top_reference_logprob_SK=_floats(scored.top_reference_logprob_NK, part),
            )
        )
    return results


def _floats(rows: Tensor | None, part: slice, width: int | None = None) -> FloatArray | None:
    if rows is None:
        return None
    chosen = rows[part] if width is None else rows[part, :width]
    floats: FloatArray = chosen.float().cpu().numpy()
    return floats
