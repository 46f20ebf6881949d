"""sft + reference: load both, prove that they make a pair and are computed right, score with both."""

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dense_reward.engine.base import Branch, EngineInfo, FloatArray, IdArray, TokenScores, Trunk, Wants
from dense_reward.engine.logprobs import Candidates, ScoredRows, Side, score_rows
from dense_reward.engine.tokenizer import TransformersTokenizer, load_tokenizer
from dense_reward.engine.torch_engine import TorchModel, load_model
from dense_reward.errors import CheckpointError, EngineLostError, OutOfMemoryError
from dense_reward.manifest import Manifest, check_pair, files_folder, load_manifest, sha256_of_text, verify_files

Report = Callable[[str], None]
QUANTITIES = frozenset({"kl", "centred", "entropy", "candidate_reward", "alternatives"})
# Root mean square of (served - stored) log-probs over the probe, in nats, above which a service does not start. Wrong
# attention or positions are wrong by more than 0.5; rounding is a tenth of each bound on the models that were tried.
PROBE_TOLERANCE_NATS = {"float64": 1e-3, "float32": 1e-3, "float16": 0.1, "bfloat16": 0.3}
# torch's own class for it covers what its allocator of a GPU's memory refuses, and nothing else.
OUT_OF_MEMORY = ("DefaultCPUAllocator: ", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
DEVICE_LOST = ("CUDA error", "device-side assert")  # after one of these every later call fails too


@dataclass(frozen=True, slots=True)
class _Sequence:
    """A prompt with one branch up to its last scored token, and where its scores go."""

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

    def cost_tokens(self, trunk: Trunk) -> int:
        """Tokens of all its sequences: the prompt is computed for each branch that has a scored token."""
        return sum(_needed_tokens(len(trunk.prompt_P), branch, self._borders) for branch in trunk.branches)

    def score(self, trunks: Sequence[Trunk], wants: Wants) -> list[list[TokenScores]]:
        try:
            return self._score(trunks, wants)
        except RuntimeError as error:
            reason = str(error)
            if not isinstance(error, torch.OutOfMemoryError) and not any(mark in reason for mark in OUT_OF_MEMORY):
                if isinstance(error, torch.AcceleratorError) or any(mark in reason for mark in DEVICE_LOST):
                    raise EngineLostError(reason) from error
                raise
        # Not from within `except`: the traceback there keeps every tensor of the batch alive.
        raise OutOfMemoryError(reason)

    def _score(self, trunks: Sequence[Trunk], wants: Wants) -> list[list[TokenScores]]:
        results = [[_nothing(branch, wants) for branch in trunk.branches] for trunk in trunks]
        for batch in _padded_batches(_sequences(trunks, self._borders), self._max_batch_tokens, self._borders):
            for sequence, scores in zip(batch, self._score_batch(batch, wants), strict=True):
                results[sequence.trunk][sequence.branch] = scores
        return results

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
        revision=_revision(manifests, dtype),
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


def _revision(manifests: Sequence[Manifest], dtype: str | None) -> str:
    """Of everything that a score depends on: all files of both, how they are served, and how text becomes ids."""
    facts = [[m.content_sha256, dtype or m.dtype, m.renderer, m.end_of_turn_id] for m in manifests]
    return sha256_of_text(json.dumps(facts))[:16]


def _probe_trunk(prompt_ids: Sequence[int], responses: Sequence[Sequence[int]]) -> Trunk:
    branches = tuple(Branch(np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=bool)) for ids in responses)
    return Trunk(np.array(prompt_ids, dtype=np.int32), branches)


def _check_tokenizer(tokenizer: TransformersTokenizer, manifest: Manifest, folder: Path) -> None:
    if tokenizer.sha256() != manifest.tokenizer_sha256:
        raise CheckpointError(f"{folder}: its tokenizer is not the one of its manifest: adopt the checkpoint anew")
    if tokenizer.template_sha256(manifest.renderer) != manifest.template_sha256:
        raise CheckpointError(f"{folder}: its chat template is not the one of its manifest: adopt the checkpoint anew")


def _sequences(trunks: Sequence[Trunk], borders: Collection[int]) -> list[_Sequence]:
    """Every branch that is computed, with its prompt; the row that predicts a token is the one before it."""
    return [
        _Sequence(
            t,
            b,
            np.concatenate([trunk.prompt_P, branch.ids_T])[:needed],
            (np.flatnonzero(branch.scored_T) + len(trunk.prompt_P) - 1).astype(np.int32),
            branch,
        )
        for t, trunk in enumerate(trunks)
        for b, branch in enumerate(trunk.branches)
        if (needed := _needed_tokens(len(trunk.prompt_P), branch, borders))
    ]


def _needed_tokens(prompt_tokens: int, branch: Branch, borders: Collection[int]) -> int:
    """Tokens of prompt and branch that are computed: up to the last scored one, none where nothing is scored.

    What comes after cannot change a score, but for a length beyond a border, which turns the whole sequence.
    """
    if not branch.scored_T.any():
        return 0
    whole = prompt_tokens + len(branch.ids_T)
    cut = whole - int(branch.scored_T[::-1].argmax())
    return whole if any(cut <= border < whole for border in borders) else cut


def _nothing(branch: Branch, wants: Wants) -> TokenScores:
    """The scores of a branch without a scored token: empty, in the shapes that were asked for."""
    row, k = np.empty(0, dtype=np.float32), wants.top_k
    width = 0 if branch.candidates_SK is None else branch.candidates_SK.shape[1]
    return TokenScores(
        row,
        row,
        kl_S=row if wants.kl else None,
        entropy_S=row if wants.entropy else None,
        candidate_reward_SK=row.reshape(0, width) if width else None,
        top_ids_SK=np.empty((0, k), dtype=np.int32) if k else None,
        top_sft_logprob_SK=row.reshape(0, k) if k else None,
        top_reference_logprob_SK=row.reshape(0, k) if k else None,
    )


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


def _candidates(batch: Sequence[_Sequence], device: torch.device) -> Candidates | None:
    """Candidates of all rows, one branch's after another's."""
    named = [(s.source.candidates_SK, len(s.positions_S)) for s in batch]
    ids = [candidates_SK.ravel() for candidates_SK, _ in named if candidates_SK is not None]
    if not ids:
        return None
    counts_N = np.concatenate([np.full(rows, 0 if ids_SK is None else ids_SK.shape[1]) for ids_SK, rows in named])
    return Candidates(torch.from_numpy(np.concatenate(ids)).to(device), torch.from_numpy(counts_N))


def _per_sequence(scored: ScoredRows, batch: Sequence[_Sequence]) -> list[TokenScores]:
    """Cut the rows of a batch at its sequences; float32 and int32 on the host."""
    results, start, named = [], 0, 0
    for sequence in batch:
        part = slice(start, start + len(sequence.positions_S))
        candidates = sequence.source.candidates_SK
        of_part = slice(named, named + (0 if candidates is None else candidates.size))
        start, named = part.stop, of_part.stop
        results.append(
            TokenScores(
                sft_logprob_S=scored.sft_logprob_N[part].float().cpu().numpy(),
                reference_logprob_S=scored.reference_logprob_N[part].float().cpu().numpy(),
                kl_S=_floats(scored.kl_N, part),
                entropy_S=_floats(scored.entropy_N, part),
                candidate_reward_SK=_candidate_rewards(scored, of_part, candidates),
                top_ids_SK=None if scored.top_ids_NK is None else scored.top_ids_NK[part].int().cpu().numpy(),
                top_sft_logprob_SK=_floats(scored.top_sft_logprob_NK, part),
                top_reference_logprob_SK=_floats(scored.top_reference_logprob_NK, part),
            )
        )
    return results


def _candidate_rewards(scored: ScoredRows, part: slice, candidates_SK: IdArray | None) -> FloatArray | None:
    rewards_m = _floats(scored.candidate_reward_M, part)
    if rewards_m is None or candidates_SK is None or not candidates_SK.shape[1]:
        return None
    return rewards_m.reshape(candidates_SK.shape)


def _floats(rows: Tensor | None, part: slice) -> FloatArray | None:
    if rows is None:
        return None
    floats: FloatArray = rows[part].float().cpu().numpy()
    return floats
