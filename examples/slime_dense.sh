#!/bin/sh
# DPR in slime (commit 624b824): an advantage for every token, from a running service.
# Not run yet: it needs GPUs, Megatron and SGLang. Run it in slime's folder; MODEL is the sft checkpoint and "$@" has
# slime's other arguments. The rewards of --rm-type are logged and used for evaluation; training does not read them.
set -eu
exec python3 train.py \
    --hf-checkpoint "$MODEL" \
    --custom-reward-post-process-path dense_reward_trainer.integrations.slime.fetch \
    --custom-advantage-function-path dense_reward_trainer.integrations.slime.advantages \
    --custom-config-path "${DENSE_REWARD:-dense_reward.yaml}" \
    --rm-type math \
    --n-samples-per-prompt 8 \
    --rollout-temperature 1 \
    --kl-coef 0 \
    "$@"
