"""The policies of a regimes study: how each is trained or sampled, and what it needs. Must not import torch."""

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, JsonValue

from dense_reward_trainer.configs.base import JobOptions, SafeName

Overrides = dict[str, JsonValue]
Grid = Annotated[dict[str, tuple[JsonValue, ...]], Field(max_length=1)]
_GRID = "key.sub -> values that are tried with the tuning seeds; the best one is used. At most one key."


class DprPolicy(JobOptions):
    """A policy trained by DPR, from the SFT model."""

    kind: Literal["dpr"]
    recipe: str = Field(default="arithmetic_dpr", description="A shipped recipe of the job dpr, or a file.")
    reference: SafeName = Field(description="The milestone of the SFT run that is the reference; its start is `base`.")
    dpr: Overrides = Field(default={}, description="key.sub -> value, over the sweep's `dpr`.")
    grid: Grid = Field(default={}, description=_GRID)

    @property
    def uses_reward(self) -> bool:
        """Whether the policy needs the log-ratio; else it is a control."""
        return self.dpr.get("signal") != "sft_logprob"

    @property
    def uses_other_model(self) -> bool:
        """Whether the policy needs a second model: a reference, or the base."""
        return self.uses_reward


class SftPolicy(JobOptions):
    """SFT that continues from the SFT model, on the same demonstrations."""

    kind: Literal["sft"]
    sft: Overrides = Field(default={}, description="key.sub -> value, over the sweep's `sft` and the regime's.")
    matched_flops: SafeName | None = Field(
        default=None, description="As many FLOPs as this DPR policy, rollouts and scoring included; null: its epochs."
    )
    grid: Grid = Field(default={}, description=_GRID)
    uses_reward: ClassVar[bool] = False
    uses_other_model: ClassVar[bool] = False


class _OwnAnswersPolicy(JobOptions):
    """A policy trained from the SFT model on demonstrations against its own answers.

    It leaves a reward, but not the log-ratio of the SFT run, so it is a control of DPR.
    """

    options: Overrides = Field(default={}, description="key.sub -> value, over the recipe.")
    grid: Grid = Field(default={}, description=_GRID)
    uses_reward: ClassVar[bool] = False
    uses_other_model: ClassVar[bool] = False


class SelfPlayPolicy(_OwnAnswersPolicy):
    """A policy that the job irft trains (SPIN, IRFT, GSIL); its reward is the log-ratio of its rounds."""

    kind: Literal["irft"]
    recipe: str = Field(default="arithmetic_irft", description="A shipped recipe of the job irft, or a file.")


class RftPolicy(_OwnAnswersPolicy):
    """The last policy of the job rft; its reward is the token head of the last round."""

    kind: Literal["rft"]
    recipe: str = Field(default="arithmetic_rft", description="A shipped recipe of the job rft, or a file.")


class SampledPolicy(JobOptions):
    """A policy that is not trained: options of `evaluate.policies`, whose folders are named by the cell's checkpoints.

    Names: `sft`, the milestones, and the trained policies.
    """

    kind: Literal["sampled"]
    options: dict[str, JsonValue] = Field(default={}, description="Options of the policy; checkpoint is sft if absent.")
    grid: Grid = Field(default={}, description=_GRID)

    @property
    def uses_reward(self) -> bool:
        """Whether the policy needs the log-ratio; else it is a control."""
        choose = self.options.get("choose")
        return self.options.get("tilt") is not None or (
            isinstance(choose, dict) and choose.get("by") in {"reward", "centred"}
        )

    @property
    def uses_other_model(self) -> bool:
        """Whether the policy needs a second model: a reference, or the base."""
        return self.uses_reward or self.options.get("extrapolate") is not None


class MatchedKlPolicy(JobOptions):
    """A sampled policy at the value of an option at which its KL to the SFT model is that of another policy."""

    kind: Literal["matched_kl"]
    to: SafeName = Field(description="The policy whose KL is matched.")
    key: str = Field(default="temperature", description="The option of the sampled policy.")
    values: tuple[float, ...] = Field(
        min_length=2, description="Values of the option, in the order of a rising KL; figures between are interpolated."
    )
    options: dict[str, JsonValue] = Field(default={}, description="Other options of the policy.")
    grid: ClassVar[Grid] = {}

    @property
    def uses_reward(self) -> bool:
        """Whether the policy needs the log-ratio; else it is a control."""
        return self.options.get("tilt") is not None

    @property
    def uses_other_model(self) -> bool:
        """Whether the policy needs a second model: a reference, or the base."""
        return self.uses_reward or self.options.get("extrapolate") is not None


AnyPolicy = DprPolicy | SftPolicy | SelfPlayPolicy | RftPolicy | SampledPolicy | MatchedKlPolicy
Policy = Annotated[AnyPolicy, Field(discriminator="kind")]
Policies = Mapping[str, AnyPolicy]


def with_value(policy: AnyPolicy, key: str, value: JsonValue) -> AnyPolicy:
    """The policy without its grid, and with one value of its grid's key."""
    match policy:
        case DprPolicy():
            return varied(policy, key, value).model_copy(update={"grid": {}})
        case SftPolicy():
            return policy.model_copy(update={"sft": policy.sft | {key: value}, "grid": {}})
        case SelfPlayPolicy() | RftPolicy():
            return policy.model_copy(update={"options": policy.options | {key: value}, "grid": {}})
        case SampledPolicy():
            return policy.model_copy(update={"options": _nested(policy.options, key, value), "grid": {}})
        case MatchedKlPolicy():
            return policy


def sampled_at(policy: MatchedKlPolicy) -> list[dict[str, JsonValue]]:
    """The options of the sampled policy at each of its values."""
    return [_nested(policy.options, policy.key, value) for value in policy.values]


def varied(policy: DprPolicy, key: str, value: JsonValue) -> DprPolicy:
    if key == "reference":
        return policy.model_copy(update={"reference": str(value)})
    return policy.model_copy(update={"dpr": policy.dpr | {key: value}})


def _nested(options: Mapping[str, JsonValue], key: str, value: JsonValue) -> dict[str, JsonValue]:
    """A copy of nested options with the value of `key.sub`."""
    name, _, rest = key.partition(".")
    inner = options.get(name)
    if not rest:
        return {**options, name: value}
    return {**options, name: _nested(inner if isinstance(inner, dict) else {}, rest, value)}


def other_policies(policy: AnyPolicy) -> Iterable[str]:
    """The policies that a policy names."""
    match policy:
        case SftPolicy(matched_flops=str(name)):
            return (name,)
        case MatchedKlPolicy(to=name):
            return (name,)
        case _:
            return ()


def controls(policies: Policies) -> tuple[list[str], list[str]]:
    """The SFT model and the policies that do not use the reward; of these, those that need no other model."""
    names = [name for name in policies if not uses_reward(policies, name)]
    return ["sft", *names], ["sft", *(name for name in names if not uses_other_model(policies, name))]


def free_controls(policies: Policies) -> list[str]:
    """The options of sampling the SFT model that cost nothing: one answer to each prompt, by one model."""
    return [
        name
        for name, policy in policies.items()
        if isinstance(policy, SampledPolicy)
        and checkpoint_of(policy) == "sft"
        and not policy.uses_other_model
        and policy.options.get("choose") is None
    ]


def uses_reward(policies: Policies, name: str) -> bool:
    """Whether a policy needs the log-ratio, or samples the checkpoint of one that was trained on it."""
    policy = policies[name]
    return policy.uses_reward or _of_checkpoint(uses_reward, policies, policy)


def uses_other_model(policies: Policies, name: str) -> bool:
    """Whether a policy needs a model beside the SFT model, or samples the checkpoint of a milestone."""
    policy = policies[name]
    milestone = checkpoint_of(policy) not in {"sft", *policies}
    return policy.uses_other_model or milestone or _of_checkpoint(uses_other_model, policies, policy)


def checkpoint_of(policy: AnyPolicy) -> str:
    """The name of the checkpoint that a policy samples; of a trained policy, that of its start."""
    if isinstance(policy, SampledPolicy | MatchedKlPolicy):
        return str(policy.options.get("checkpoint", "sft"))
    return "sft"


def _of_checkpoint(asked: Callable[[Policies, str], bool], policies: Policies, policy: AnyPolicy) -> bool:
    name = checkpoint_of(policy)
    return name in policies and asked(policies, name)
