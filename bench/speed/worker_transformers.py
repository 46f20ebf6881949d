"""Worker: scores both checkpoints with transformers, in the usual way (plain) and as fast as we could (best)."""

import argparse
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench.speed.processes import Answer, Facts, Logprobs, Question, serve, timed
from bench.speed.workload import Item

Sequences = Sequence[tuple[list[int], int]]  # ids, and the length of the prompt
HEAD_ROWS = 512
FLOAT32_BYTES = 4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sft", required=True, type=Path)
    parser.add_argument("--reference", required=True, type=Path)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    def start() -> tuple[Facts, Pair]:
        attention = attention_of(options.device)
        folders = (options.sft, options.reference)
        pair = Pair([load(folder, options.dtype, options.device, attention) for folder in folders])
        return {"attention": attention}, pair

    serve(start)


def attention_of(device: str) -> str:
    flash = device != "cpu" and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if flash else "sdpa"


def load(folder: Path, dtype: str, device: str, attention: str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation=attention, local_files_only=True
    )
    return model.to(device).eval()


class Pair:
    """Answers questions with method plain or best."""

    def __init__(self, models: Sequence[PreTrainedModel]) -> None:
        self._models = models

    def __call__(self, question: Question) -> Answer:
        def score(items: tuple[Item, ...]) -> Logprobs:
            sequences = [(ids, len(item.prompt_ids)) for item in items for ids in item.sequences]
            method = plain if question["method"] == "plain" else best
            return np.stack([method(model, sequences, question["batch"]) for model in self._models])

        try:
            return timed(question, score)
        except (MemoryError, torch.OutOfMemoryError) as error:
            return {"error": str(error)}


@torch.inference_mode()
def plain(model: PreTrainedModel, sequences: Sequences, batch: int) -> Logprobs:
    """Batches in the given order, padded on the right and masked; logits and log-softmax of every position."""
    found = []
    for part in batches(sequences, batch):
        ids_BL, mask_BL = padded(part, model.device)
        check_memory(model, ids_BL)
        logits_BLV = model(input_ids=ids_BL, attention_mask=mask_BL).logits
        logprobs_BLV = torch.log_softmax(logits_BLV[:, :-1].float(), dim=-1)
        logprobs_BL = logprobs_BLV.gather(2, ids_BL[:, 1:, None])[..., 0].cpu()
        found += [logprobs_BL[row, prompt - 1 : len(ids) - 1] for row, (ids, prompt) in enumerate(part)]
    return torch.cat(found).numpy()


@torch.inference_mode()
def best(model: PreTrainedModel, sequences: Sequences, batch: int) -> Logprobs:
    """Batches of similar length without a mask (padding is on the right); the head only on response positions."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]))
    found: dict[int, Tensor] = {}
    for indices in [order[start : start + batch] for start in range(0, len(order), batch)]:
        part = [sequences[i] for i in indices]
        ids_BL, _ = padded(part, model.device)
        states_BLD = model.model(input_ids=ids_BL, use_cache=False).last_hidden_state
        rows_ND = torch.cat([states_BLD[row, prompt - 1 : len(ids) - 1] for row, (ids, prompt) in enumerate(part)])
        targets_N = torch.cat([ids_BL[row, prompt : len(ids)] for row, (ids, prompt) in enumerate(part)])
        counts = [len(ids) - prompt for ids, prompt in part]
        found |= dict(zip(indices, torch.split(head_logprobs(model, rows_ND, targets_N).cpu(), counts), strict=True))
    return torch.cat([found[i] for i in range(len(sequences))]).numpy()


def head_logprobs(model: PreTrainedModel, rows_ND: Tensor, targets_N: Tensor) -> Tensor:
    """float32 [N], computed in chunks of rows."""
    logprobs = []
    for start in range(0, len(rows_ND), HEAD_ROWS):
        logits_CV = model.lm_head(rows_ND[start : start + HEAD_ROWS]).float()
        targets_C1 = targets_N[start : start + HEAD_ROWS, None]
        logprobs.append(logits_CV.gather(1, targets_C1)[:, 0] - logits_CV.logsumexp(1))
    return torch.cat(logprobs)


def batches(sequences: Sequences, batch: int) -> Iterator[Sequences]:
    for start in range(0, len(sequences), batch):
        yield sequences[start : start + batch]


def padded(sequences: Sequences, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask, [B, L], padded on the right."""
    longest = max(len(ids) for ids, _ in sequences)
    ids_BL = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in sequences])
    mask_BL = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in sequences])
    return ids_BL.to(device), mask_BL.to(device)


def check_memory(model: PreTrainedModel, ids_BL: Tensor) -> None:
    """Raises MemoryError if logits and log-probs of all positions do not fit into free memory.

    Otherwise the kernel would kill a process. A GPU's allocator raises by itself.
    """
    if model.device.type != "cpu":
        return
    needed = 2 * ids_BL.numel() * model.config.vocab_size * FLOAT32_BYTES
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    if needed > free:
        raise MemoryError(f"logits of all positions need {needed / 1e9:.1f} GB, only {free / 1e9:.1f} GB are free")


if __name__ == "__main__":
    main()
