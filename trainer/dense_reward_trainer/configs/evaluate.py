"""Configuration of the `evaluate` job: the policies to compare. Must not import torch: the command line parses first.

A policy is a checkpoint and the way it is sampled. The policies with a tilt, an extrapolation or a choice need no
training: they are the controls that training must beat.
"""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from dense_reward_trainer.configs.advantages import Finite
from dense_reward_trainer.configs.base import JobOptions, SafeName
from dense_reward_trainer.configs.dpr import AUTO, PRECISION, THREADS, Device, HeldOutOptions, Precision
from dense_reward_trainer.configs.service import SERVICE_KEYS, ServiceJobConfig
from dense_reward_trainer.configs.signals import WINDOW_TOKENS, Aggregate, TokenSignal

ChoiceRule = Literal["majority", "power"]
Positive = Annotated[Finite, Field(gt=0.0)]
# Beyond these bounds float32 log-probs overflow.
Strength = Annotated[Finite, Field(gt=0.0, le=100.0)]
Temperature = Annotated[Finite, Field(ge=0.001)]


class TiltOptions(JobOptions):
    """Tilts a policy away from a reference in every state, by the logits of two models."""

    reference: Path = Field(description="Checkpoint folder of pi_ref.")
    strength: Strength = Field(
        default=1.0,
        description="a in pi(token) proportional to pi_sft (pi_sft / pi_ref)^a. DPR with returns immediate and "
        "kl_coefficient b moves towards a = 1/b.",
    )


class ExtrapolateOptions(JobOptions):
    """Extrapolates the weights of a policy beyond those of its base (ExPO, arXiv 2404.16792)."""

    base: Path = Field(description="Checkpoint folder of theta_base: the same architecture and tokenizer.")
    strength: Strength = Field(
        default=0.5,
        description="a in theta = theta_sft + a (theta_sft - theta_base). The right a is small for some models.",
    )


class ChooseOptions(JobOptions):
    """Draws several samples for each prompt and keeps one of them as the answer."""

    samples: int = Field(default=8, ge=2, description="Samples for each prompt, one of which is chosen.")
    by: ChoiceRule | TokenSignal = Field(
        description="majority: the answer that most samples give, found by held_out_options.checker; of equally "
        "frequent answers the one that reaches its number of votes first; samples that are cut off or give no answer "
        "do not vote. power: one sample drawn with weights pi(y)^(power-1); for many samples this approaches samples "
        "from pi^power over whole responses (power sampling, arXiv 2601.21590). A signal: the sample with the highest "
        "aggregate of this signal at the service; samples that are cut off only if all are."
    )
    power: Positive | None = Field(default=None, description="With by power: the exponent. null for the other rules.")
    aggregate: Aggregate | None = Field(
        default=None, description="With a signal: how the signals of its tokens become one number of a sample."
    )
    window: int = Field(default=WINDOW_TOKENS, ge=1, description="Tokens in the window of aggregate window_min.")
    pair: str | None = Field(
        default=None, description="With a signal: the pair at the service whose signal it is; null: service_pair."
    )

    @property
    def signal(self) -> TokenSignal | None:
        """The signal that chooses; None for majority and power."""
        match self.by:
            case "majority" | "power":
                return None
            case signal:
                return signal

    @model_validator(mode="after")
    def _keys_of_their_rule(self) -> Self:
        if (self.by == "power") != (self.power is not None):
            raise ValueError("power is the exponent of by: power; set both, or neither")
        if (self.signal is None) != (self.aggregate is None):
            raise ValueError(
                "aggregate says how the signals of tokens become one number: set it if `by` is a signal, and only then"
            )
        if self.signal is None and self.pair is not None:
            raise ValueError("pair names the pair of a signal: set by to a signal, or pair to null")
        if self.aggregate != "window_min" and "window" in self.model_fields_set and self.window != WINDOW_TOKENS:
            raise ValueError("window is that of aggregate window_min: set aggregate to window_min, or leave window out")
        return self


class PolicyOptions(JobOptions):
    """A policy: a checkpoint and how it is sampled. A plain path is a checkpoint that is sampled as it is."""

    checkpoint: Path = Field(description="Checkpoint folder; pi_sft or theta_sft in `tilt` and `extrapolate`.")
    temperature: Temperature = Field(
        default=1.0, description="Sampling temperature; greedy answers do not depend on it."
    )
    top_p: float = Field(
        default=1.0, gt=0.0, le=1.0, description="Sample only the likeliest tokens that together have this probability."
    )
    min_p: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Sample only tokens with this share of the likeliest token's probability.",
    )
    tilt: TiltOptions | None = Field(default=None, description="Tilt the policy away from a reference; null: do not.")
    extrapolate: ExtrapolateOptions | None = Field(
        default=None, description="Extrapolate the weights beyond those of a base; null: do not."
    )
    choose: ChooseOptions | None = Field(
        default=None, description="Draw several samples and choose one; null: every sample counts."
    )

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: object) -> object:
        return {"checkpoint": value} if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if self.tilt is not None and self.extrapolate is not None:
            raise ValueError("tilt and extrapolate are two policies: give each its own name")
        return self

    @property
    def sampled(self) -> Self:
        """The policy whose samples these are: policies with an equal one share their samples."""
        return self.model_copy(update={"choose": None})


class EvaluateConfig(ServiceJobConfig):
    """Policies to measure on the same held-out prompts."""

    # A policy that changed is measured again (policies/kept.py).
    resume_may_change: ClassVar[frozenset[str]] = SERVICE_KEYS | {"output_dir", "threads", "policies", "pass_at"}

    policies: dict[SafeName, PolicyOptions] = Field(
        min_length=1,
        description="Name in the table -> the policy: a checkpoint folder, or the keys of a policy. Policies that "
        "differ only in `choose` share their samples.",
    )
    held_out: Path = Field(
        description="Prompts to measure on: held_out.jsonl of the SFT run, or any file of demonstrations."
    )
    service_url: str | None = Field(
        default=None,
        description="Address of the reward service; the KL is measured to its SFT model. null: no KL is measured.",
    )
    held_out_options: HeldOutOptions = Field(default=HeldOutOptions(), description="How held_out is measured.")
    pass_at: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(),
        description="k of pass@k, the chance that one of k samples is right; each at most "
        "held_out_options.samples_per_prompt.",
    )
    device: Device = Field(default="auto", description=AUTO)
    precision: Precision = Field(default="float32", description=PRECISION)
    threads: int | None = Field(default=None, ge=1, description=THREADS)

    @model_validator(mode="before")
    @classmethod
    def _keys_of_older_recipes(cls, values: object) -> object:
        if isinstance(values, dict) and (old := sorted({"checkpoints", "temperatures"} & values.keys())):
            raise ValueError(
                f"{old[0]} is now part of policies: write `policies: {{NAME: FOLDER}}`, or `policies: {{NAME: "
                "{checkpoint: FOLDER, temperature: 0.7}}`"
            )
        return values

    @model_validator(mode="after")
    def _enough_samples(self) -> Self:
        most, samples = max(self.pass_at, default=0), self.held_out_options.samples_per_prompt
        if most > samples:
            raise ValueError(
                f"pass@{most} needs {most} samples for each prompt, but held_out_options.samples_per_prompt is "
                f"{samples}: raise it, or lower pass_at"
            )
        return self

    @model_validator(mode="after")
    def _service_of_signals(self) -> Self:
        for name, policy in self.policies.items():
            if self.service_url is None and policy.choose is not None and policy.choose.signal is not None:
                raise ValueError(
                    f"policies.{name} chooses by {policy.choose.by}, which a reward service computes: set service_url"
                )
        return self
