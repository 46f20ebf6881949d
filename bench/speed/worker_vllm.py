"""Worker: one checkpoint by vLLM's prompt log-probs. Runs in an environment with only vLLM and numpy.

For its settings see docs/benchmarks.md.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import vllm  # type: ignore[import-not-found, unused-ignore] # only in .venv-vllm
from vllm import LLM, SamplingParams  # type: ignore[import-not-found, unused-ignore]

from bench.speed.processes import Answer, Facts, Logprobs, Question, serve, timed
from bench.speed.workload import Item

MAX_LENGTH_TOKENS = 2048
SETTINGS: dict[str, object] = {"skip_tokenizer_init": True, "max_model_len": MAX_LENGTH_TOKENS}
ON_CPU: dict[str, object] = {"enforce_eager": True}
ON_GPU: dict[str, object] = {"gpu_memory_utilization": 0.2}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--compiled", action="store_true", help="compile on a CPU too")
    options = parser.parse_args()

    def start() -> tuple[Facts, "Checkpoint"]:
        settings = SETTINGS | (ON_GPU if options.device != "cpu" else {} if options.compiled else ON_CPU)
        model = LLM(model=options.folder, dtype=options.dtype, **settings)  # type: ignore[arg-type, unused-ignore]
        return {"version": vllm.__version__, "settings": settings | environment()}, Checkpoint(model)

    serve(start)


def environment() -> dict[str, object]:
    """Returns vLLM's environment variables, without paths."""
    variables = {name: value for name, value in os.environ.items() if name.startswith("VLLM_CPU_")}
    return {**variables, "LD_PRELOAD": [Path(path).name for path in os.environ.get("LD_PRELOAD", "").split(":")]}


class Checkpoint:
    """Log-probs of all responses, from one call of vLLM per request."""

    def __init__(self, model: LLM) -> None:
        self._model = model
        self._wanted = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, flat_logprobs=True)

    def __call__(self, question: Question) -> Answer:
        return timed(question, self._score)

    def _score(self, items: tuple[Item, ...]) -> Logprobs:
        sequences = [(ids, len(item.prompt_ids)) for item in items for ids in item.sequences]
        prompts = [{"prompt_token_ids": ids} for ids, _ in sequences]
        outputs = self._model.generate(prompts, self._wanted, use_tqdm=False)
        rows = [
            np.array(flat.logprobs, dtype=np.float32)[flat.start_indices[prompt:]]
            for (_, prompt), flat in zip(sequences, (output.prompt_logprobs for output in outputs), strict=True)
        ]
        return np.concatenate(rows)[None]


if __name__ == "__main__":
    main()
