"""A checkpoint's probe: a few id sequences with the log-probs (or head values) that its weights give, in float32.

Computed one sequence at a time. Every engine that serves the checkpoint is verified against it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dense_reward.engines.token_head.engine import HeadModel
from dense_reward.engines.torch.model import TorchModel
from dense_reward.errors import CheckpointError
from dense_reward.manifest import ProbeResponse, ProbeSequence
from dense_reward.text.encode import Encoder
from dense_reward.text.encoded import Encoded

ProbedModel = TorchModel | HeadModel


@dataclass(frozen=True, slots=True)
class ProbeText:
    """A prompt and responses to it, as text."""

    prompt: str
    responses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ProbeIds:
    """A prompt and responses to it, as ids, none of them empty."""

    prompt_ids: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]

    @property
    def longest(self) -> int:
        """Tokens of the prompt and its longest response."""
        return len(self.prompt_ids) + max(map(len, self.responses))


# Short: they must fit into a small model's context even if the tokenizer makes a token of every byte.
PROBE_TEXTS = (
    ProbeText("What is 17 + 25?", ("17 + 25 = 42.", "It is 42: 7 + 5 = 12, carry 1.")),
    ProbeText("Name the capital of France.", ("Paris.", "The capital of France is Paris, on the Seine.")),
    ProbeText("def square(x):", ("    return x ** 2\n", "    # 2 is the exponent\n    return pow(x, 2)\n")),
    ProbeText("法国的首都是哪里?", ("巴黎。", "法国的首都是巴黎。")),
    ProbeText("Столица Франции?", ("Париж.", "مدينة باريس 👩‍🔬")),
)


def probe_numbers(model: ProbedModel, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[float]:
    """What a probe stores of a response: its log-probs in nats, or the values of a token head."""
    if isinstance(model, HeadModel):
        return model.values(prompt_ids, response_ids)
    return model.logprobs(prompt_ids, response_ids)


def measure_probe(model: ProbedModel, sequences: Sequence[ProbeIds]) -> tuple[ProbeSequence, ...]:
    """The sequences with the model's log-probs in nats, or values. The model must have been loaded in float32.

    Raises ValueError for fewer than two prompts or a prompt with fewer than two responses: errors in batching,
    positions or masks show only with several. Raises CheckpointError if an id is none of the model's or a number
    is not finite.
    """
    if len(sequences) < 2 or any(len(sequence.responses) < 2 for sequence in sequences):
        raise ValueError("a probe needs at least two prompts with two responses each")
    return tuple(_measure_one(model, sequence) for sequence in sequences)


def _measure_one(model: ProbedModel, sequence: ProbeIds) -> ProbeSequence:
    largest = max(sequence.prompt_ids + tuple(i for ids in sequence.responses for i in ids))
    if largest >= model.vocab_size:
        raise CheckpointError(
            f"the tokenizer gives id {largest}, but the model has only {model.vocab_size} output rows: "
            "copy the tokenizer and the weights from one checkpoint"
        )
    responses = []
    for ids in sequence.responses:
        logprobs = tuple(probe_numbers(model, sequence.prompt_ids, ids))
        if not all(map(math.isfinite, logprobs)):
            raise CheckpointError(
                "the model computes numbers that are not finite: its weights are broken, so copy or train it again"
            )
        responses.append(ProbeResponse(ids=ids, logprobs=logprobs))
    return ProbeSequence(prompt_ids=sequence.prompt_ids, responses=tuple(responses))


def probe_of_texts(
    encoder: Encoder, limit_tokens: int, texts: Sequence[ProbeText] = PROBE_TEXTS
) -> tuple[ProbeIds, ...]:
    """The texts that fit into `limit_tokens`, encoded as prompts and responses of the checkpoint.

    Raises CheckpointError if fewer than two fit.
    """
    add_eos = encoder.end_of_turn_id is not None
    encoded = [
        ProbeIds(
            tuple(map(int, encoder.prompt(text.prompt))),
            tuple(tuple(map(int, encoder.response(r, add_eos=add_eos).ids_T)) for r in text.responses),
        )
        for text in texts
    ]
    fitting = tuple(probe for probe in encoded if probe.longest <= limit_tokens)
    if len(fitting) < 2:
        raise CheckpointError(
            f"the model takes {limit_tokens} tokens, in which only {len(fitting)} of the probe's texts fit "
            "(two are needed): use a model with a longer context"
        )
    return fitting


def probe_of_demonstrations(encoded: Sequence[Encoded], limit_tokens: int) -> tuple[ProbeIds, ...]:
    """The two shortest demonstrations with different prompts, each with its own response and the other's.

    Responses are cut at the end of the model's context. Empty if there are no two different prompts.
    """
    by_prompt: dict[tuple[int, ...], tuple[int, ...]] = {}
    for demonstration in sorted(encoded, key=_length):
        by_prompt.setdefault(tuple(map(int, demonstration.prompt_P)), tuple(map(int, demonstration.responses[0].ids_T)))
        if len(by_prompt) == 2:
            break
    if len(by_prompt) < 2:
        return ()
    first, second = by_prompt.values()
    return tuple(
        ProbeIds(prompt, tuple(response[: limit_tokens - len(prompt)] for response in (first, second)))
        for prompt in by_prompt
    )


def _length(encoded: Encoded) -> int:
    return len(encoded.prompt_P) + len(encoded.responses[0].ids_T)
