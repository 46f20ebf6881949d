"""Configuration of the `judge` job. Must not import torch: the command line parses before any slow import."""

from pathlib import Path
from typing import ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from dense_reward_trainer.configs.base import JobConfig, JobOptions, SafeName, Seed

PromptName = Literal["first_turn", "second_turn", "creative_writing"]
PLACES: dict[str, frozenset[str]] = dict.fromkeys(
    get_args(PromptName), frozenset({"{question}", "{answer_a}", "{answer_b}"})
) | {"second_turn": frozenset({"{question_2}", "{answer_a_2}", "{answer_b_2}"})}
"""What the text for the judge must have: without one of these it would judge what it does not see."""


class JudgePrompt(JobOptions):
    """What a judge is asked: a system prompt, and a text with places for the question and both answers."""

    system: str = Field(description="The system prompt.")
    user: str = Field(
        description="The text, with {question}, {answer_a} and {answer_b}; of second_turn with {question_1}, "
        "{question_2}, {answer_a_1}, {answer_a_2}, {answer_b_1} and {answer_b_2}."
    )


class JudgeOptions(JobOptions):
    """A judge behind a URL that speaks OpenAI's chat completions, such as vLLM, SGLang or a provider."""

    url: str = Field(pattern=r"^https?://", description="Up to and with /v1, such as http://localhost:8000/v1.")
    model: str = Field(min_length=1, description="The model's name at the judge.")
    api_key_variable: str | None = Field(
        default=None, description="Name of the environment variable that holds the key; null: no key is sent."
    )
    max_tokens: int = Field(default=2048, ge=1, description="Longest reply. AlpacaEval 2 takes 1, Arena-Hard 16000.")
    temperature: float = Field(default=0.0, ge=0.0, description="0: the likeliest reply. AlpacaEval 2 takes 1.")
    input_price: float | None = Field(default=None, ge=0.0, description="Price of a million prompt tokens.")
    output_price: float | None = Field(default=None, ge=0.0, description="Price of a million tokens of replies.")
    concurrency: int = Field(default=8, ge=1, description="Requests on their way at the same time.")
    retries: int = Field(default=6, ge=0, description="Retries of a request after HTTP 429, 5xx or a lost connection.")
    timeout_s: float = Field(default=600.0, gt=0.0, description="Seconds to wait for one reply.")


class JudgeConfig(JobConfig):
    """Win rates of policies against a baseline, by the verdicts of one or two judges, in both orders."""

    # A reply is kept under the hash of its request, so it stays right whatever else changes.
    resume_may_change: ClassVar[frozenset[str]] = frozenset(
        {"output_dir", "answers", "baseline", "judges", "prompts", "training_prompts", "estimate_only"}
    )

    benchmark: Literal["alpaca_eval", "arena_hard", "mt_bench", "lima"] = Field(
        description="Whose questions, verdicts and file formats."
    )
    questions: Path = Field(description="The benchmark's own file of questions.")
    answers: dict[SafeName, Path] = Field(
        default={},
        description="Policy -> its answers: samples.jsonl of `sample`, or a file in the benchmark's format. Policies "
        "can be added later. Without any, only the prompts are written.",
    )
    baseline: SafeName = Field(default="sft", description="The policy that the others are compared with.")
    judges: dict[SafeName, JudgeOptions] = Field(
        min_length=1, max_length=2, description="Name -> judge. With two, their agreement is reported."
    )
    prompts: dict[PromptName, JudgePrompt] = Field(
        default={},
        description="Prompts in place of this project's own, such as the benchmark's: first_turn, second_turn "
        "(MT-Bench) and creative_writing (Arena-Hard's questions of that category).",
    )
    training_prompts: Path | None = Field(
        default=None, description="The training data, to count test prompts that occur in it; null: not checked."
    )
    limit: int | None = Field(default=None, ge=1, description="Use only the first `limit` questions; null: all.")
    estimate_only: bool = Field(default=False, description="Only estimate tokens and cost; ask nothing.")
    seed: Seed = Field(default=0, description="Seed of the bootstrap.")

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        for name, prompt in self.prompts.items():
            missing = sorted(place for place in PLACES[name] if place not in prompt.user)
            if missing:
                raise ValueError(f"prompts.{name}.user lacks {', '.join(missing)}: the judge would not see it")
        if self.answers and self.baseline not in self.answers:
            raise ValueError(f"answers has no {self.baseline}, which is the baseline: add it, or name another baseline")
        if len(self.answers) == 1:
            raise ValueError("answers has only the baseline: add a policy to compare with it")
        return self
