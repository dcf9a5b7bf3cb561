#!/usr/bin/env bash
# Trains a model by GRPO on the 20 % of the response tokens with the highest entropy, on one node. Fill in the paths:
#
#   MODEL_PATH=Qwen/Qwen3-8B TRAIN_FILES=train.parquet VAL_FILES=test.parquet ./run_entropy_top20.sh
#
# Arguments that you add override those below. The script has run with a tiny model on a CPU, never on a GPU.
set -euo pipefail

: "${MODEL_PATH:?set it to a Hugging Face model, such as Qwen/Qwen3-8B}"
: "${TRAIN_FILES:?set it to a Parquet file in verl's format}"
: "${VAL_FILES:?set it to a Parquet file in verl's format}"

exec python -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    data.train_files="$TRAIN_FILES" \
    data.val_files="$VAL_FILES" \
    data.train_batch_size=256 \
    data.max_prompt_length=1024 \
    data.max_response_length=4096 \
    data.filter_overlong_prompts=True \
    actor_rollout_ref.model.path="$MODEL_PATH" \
    actor_rollout_ref.model.use_remove_padding=True \
    actor_rollout_ref.model.enable_gradient_checkpointing=True \
    actor_rollout_ref.actor.entropy_top_ratio=0.2 \
    actor_rollout_ref.actor.policy_loss.loss_mode=vanilla \
    actor_rollout_ref.actor.loss_agg_mode=token-mean \
    actor_rollout_ref.actor.strategy=fsdp2 \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.ppo_mini_batch_size=64 \
    actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384 \
    actor_rollout_ref.actor.use_kl_loss=False \
    actor_rollout_ref.actor.entropy_coeff=0 \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6 \
    actor_rollout_ref.rollout.n=8 \
    trainer.n_gpus_per_node=8 \
    trainer.nnodes=1 \
    trainer.total_epochs=10 \
    trainer.save_freq=20 \
    trainer.test_freq=10 \
    trainer.logger='[console,tensorboard]' \
    trainer.project_name=entropy_token_rule \
    trainer.experiment_name=entropy_top20 \
    "$@"
