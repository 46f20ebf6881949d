"""How token rewards become the advantages of a policy gradient: options of the jobs that train by DPR, and of TRL.

Must not import torch: the command line parses before it imports anything slow.
"""

from typing import Annotated, Literal, Self

from dense_reward.schemas import SignalName
from pydantic import Field, field_validator, model_validator

from dense_reward_trainer.configs.base import JobOptions

ReturnName = Literal["reward_to_go", "immediate", "total", "min"]
BaselineName = Literal["none", "batch", "leave_one_out", "kl"]
KlPenalty = Literal["reward", "loss_k2", "loss_k3"]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class AdvantageOptions(JobOptions):
    """The signal, what it credits, and what is subtracted. "The paper" is that of DPR (arXiv 2510.02493)."""

    group_size: int = Field(
        default=8, ge=1, description="Responses sampled for each prompt. The paper leaves this open."
    )
    signal: SignalName = Field(
        default="reward",
        description="The reward of a token. reward: equation 5 of the paper. centred: reward - kl, a different "
        "objective. sft_logprob: the paper's ablation without a reference. With returns immediate and b "
        "the kl_coefficient (kl_penalty reward or loss_k2), the fixed point in every state is pi_sft "
        "(pi_sft / pi_ref)^(1/b) for reward and centred, and pi_sft^(1 + 1/b) for sft_logprob, which is "
        "pi_sft at temperature b / (1 + b): 1/2 for b = 1.",
    )
    candidates: int = Field(
        default=0,
        ge=0,
        le=64,
        description="Also score this many likeliest ids of the policy at every position. The gradient then sums their "
        "immediate rewards exactly instead of sampling; later rewards stay sampled. 0: samples only.",
    )
    returns: ReturnName = Field(
        default="reward_to_go",
        description="The credit of an action. reward_to_go: its own reward and all later ones. immediate: only its "
        "own (ignores what it leads to); its fixed point is known, see signal, and can be sampled without "
        "training, see `tilt` of evaluate. total: all rewards of the response, as if given at its end "
        "(the same expected gradient as reward_to_go, more noise). min: the least of its own and all "
        "later signals (arXiv 2504.15275), plus the reward-to-go of the KL penalty. Its gradient is, in "
        "every state, that of the expected least signal from there on; it is not that of the least signal "
        "of the response. The paper leaves this open.",
    )
    gamma: float = Field(
        default=1.0,
        ge=0.0,
        le=1.0,
        description="Discount of the reward-to-go. Below 1 it favours near rewards, and the gradient is that of no "
        "objective: for E[sum of gamma^t r_t], the credit at t would also have the factor gamma^t. The "
        "paper's value is 1.",
    )
    baseline: BaselineName = Field(
        default="leave_one_out",
        description="Subtracted from the return, position by position. none; batch: the mean over the batch; "
        "leave_one_out: the mean over the other responses to the prompt; kl: kl(pi_sft || pi_ref) of the state. The "
        "paper leaves this open.",
    )
    whiten: bool = Field(
        default=False,
        description="Scale advantages to mean 0 and standard deviation 1 over the batch. The paper leaves this open.",
    )
    reward_clip: float | None = Field(
        default=None,
        gt=0.0,
        allow_inf_nan=False,
        description="Clip the signal of a token to this many nats on both sides; null: no clipping. The paper leaves "
        "this open.",
    )
    kl_coefficient: Annotated[Finite, Field(ge=0.0)] = Field(
        default=0.1,
        description="b in the objective E[sum r] - b KL(pi || pi_sft). The paper has a KL to the SFT model, but leaves "
        "its coefficient open.",
    )
    kl_penalty: KlPenalty = Field(
        default="reward",
        description="Where the KL penalty is applied. reward: r_t - b (log pi - log pi_sft), whose gradient is that of "
        "the KL between whole responses. loss_k2 or loss_k3: a term of the loss, whose gradient is that of "
        "KL(pi || pi_sft) or of KL(pi_sft || pi) in each state, ignoring later states. The paper leaves this open.",
    )

    @model_validator(mode="after")
    def _groups_for_leave_one_out(self) -> Self:
        if self.baseline == "leave_one_out" and self.group_size < 2:
            raise ValueError("baseline leave_one_out compares responses to one prompt: set group_size to at least 2")
        if self.gamma < 1 and self.returns != "reward_to_go":
            raise ValueError(
                f"gamma only discounts returns reward_to_go, but returns is {self.returns}: set gamma to 1"
            )
        return self

    @field_validator("kl_penalty", mode="before")
    @classmethod
    def _no_k1_loss(cls, value: object) -> object:
        if value == "loss_k1":
            raise ValueError(
                "loss_k1 would do nothing: the expected gradient of log pi - log pi_sft under samples from pi is 0; "
                "set reward, loss_k2 or loss_k3"
            )
        return value
