#!/bin/sh
# DPR in miles (commit 31f1ca9): an advantage for every token, from a running service.
# Not run yet: it needs GPUs, Megatron and SGLang. Run it in miles' folder; MODEL is the sft checkpoint and "$@" has
# miles' other arguments. The rewards of --rm-type are logged and used for evaluation; training does not read them.
set -eu
exec python3 train.py \
    --hf-checkpoint "$MODEL" \
    --custom-reward-post-process-path dense_reward_trainer.integrations.miles.fetch \
    --use-opd --opd-type sglang --opd-kl-coef 1 \
    --advantage-estimator grpo \
    --custom-config-path "${DENSE_REWARD:-dense_reward.yaml}" \
    --rm-type math \
    --n-samples-per-prompt 8 \
    --rollout-temperature 1 \
    --kl-coef 0 \
    "$@"
