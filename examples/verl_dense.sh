#!/bin/sh
# DPR in verl 0.9: a reward for every token from a running service, and the reward-to-go minus that of the other answers.
# Not run yet: it needs GPUs. Give MODEL (the sft checkpoint), TRAIN and TEST (verl's Parquet files); rows of TEST should
# have the column agent_name = single_turn_agent, so that verl's own reward function judges them.
set -eu
export VERL_USE_EXTERNAL_MODULES=dense_reward_trainer.integrations.verl
exec python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=dense_reward \
    algorithm.use_kl_in_reward=True \
    algorithm.kl_ctrl.kl_coef=0.1 \
    actor_rollout_ref.model.path="$MODEL" \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.rollout.agent.default_agent_loop=dense_reward \
    actor_rollout_ref.rollout.agent.agent_loop_config_path="$(dirname "$0")/verl_agent_loop.yaml" \
    data.train_files="$TRAIN" \
    data.val_files="$TEST" \
    "$@"
