#!/usr/bin/env bash
# Trains a 14B model by DAPO on the 20 % of the response tokens with the highest entropy, with the paper's
# hyperparameters ("Beyond the 80/20 Rule", arXiv 2506.01939). Fill in the paths:
#
#   MODEL_PATH=Qwen/Qwen3-14B-Base TRAIN_FILES=dapo-math-17k.parquet VAL_FILES=aime-2024.parquet NNODES=4 \
#       ./run_dapo_14b_entropy_top20.sh
#
# Arguments that you add override those below. The paper does not say how to spread the model over GPUs: offloading,
# Ulysses and tensor-parallel sizes are this script's choice. It has run with a tiny model on a CPU, never on a GPU.
set -euo pipefail

: "${MODEL_PATH:?set it to a Hugging Face model, such as Qwen/Qwen3-14B-Base}"
: "${TRAIN_FILES:?set it to a Parquet file in verl's format}"
: "${VAL_FILES:?set it to a Parquet file in verl's format}"

max_prompt_length=2048
max_response_length=20480
overlong_buffer=4096

exec python -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    algorithm.use_kl_in_reward=False \
    algorithm.filter_groups.enable=True \
    algorithm.filter_groups.metric=acc \
    data.train_files="$TRAIN_FILES" \
    data.val_files="$VAL_FILES" \
    data.train_batch_size=512 \
    data.max_prompt_length=$max_prompt_length \
    data.max_response_length=$max_response_length \
    data.truncation=left \
    reward.reward_manager.name=dapo \
    +reward.reward_kwargs.max_resp_len=$max_response_length \
    +reward.reward_kwargs.overlong_buffer_cfg.enable=True \
    +reward.reward_kwargs.overlong_buffer_cfg.len=$overlong_buffer \
    +reward.reward_kwargs.overlong_buffer_cfg.penalty_factor=1.0 \
    +reward.reward_kwargs.overlong_buffer_cfg.log=False \
    actor_rollout_ref.model.path="$MODEL_PATH" \
    actor_rollout_ref.model.use_remove_padding=True \
    actor_rollout_ref.model.enable_gradient_checkpointing=True \
    actor_rollout_ref.actor.entropy_top_ratio=0.2 \
    actor_rollout_ref.actor.policy_loss.loss_mode=vanilla \
    actor_rollout_ref.actor.loss_agg_mode=token-mean \
    actor_rollout_ref.actor.clip_ratio_low=0.2 \
    actor_rollout_ref.actor.clip_ratio_high=0.28 \
    actor_rollout_ref.actor.clip_ratio_c=10.0 \
    actor_rollout_ref.actor.use_kl_loss=False \
    actor_rollout_ref.actor.entropy_coeff=0 \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.optim.lr_warmup_steps=10 \
    actor_rollout_ref.actor.optim.weight_decay=0.1 \
    actor_rollout_ref.actor.ppo_mini_batch_size=32 \
    actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=$((max_prompt_length + max_response_length)) \
    actor_rollout_ref.actor.strategy=fsdp2 \
    actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size=4 \
    actor_rollout_ref.actor.fsdp_config.param_offload=True \
    actor_rollout_ref.actor.fsdp_config.optimizer_offload=True \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=16 \
    actor_rollout_ref.rollout.temperature=1.0 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=4 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.8 \
    trainer.n_gpus_per_node=8 \
    trainer.nnodes="${NNODES:-4}" \
    trainer.total_epochs=10 \
    trainer.save_freq=10 \
    trainer.test_freq=10 \
    trainer.logger='[console,tensorboard]' \
    trainer.project_name=entropy_token_rule \
    trainer.experiment_name=dapo_14b_entropy_top20 \
    "$@"
