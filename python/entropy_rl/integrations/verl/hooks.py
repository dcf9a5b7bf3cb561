"""What this package replaces or calls in verl, beside its documented functions (`entropy_rl.integrations.Hooks`)."""

import sys

_ACTOR = (
    "..., strategy, policy_loss, loss_agg_mode, loss_scale_factor, entropy_coeff, use_kl_loss, kl_loss_coef, "
    "kl_loss_type, use_fused_kernels"
)
# The configurations and the loss.
LOSS = {
    "verl.workers.config:FSDPActorConfig": _ACTOR,
    "verl.workers.config:McoreActorConfig": _ACTOR,
    "verl.workers.utils.losses:ppo_loss": "config, model_output, data, dp_group",
    "verl.utils.config:validate_config": "config, ...",
    "verl.workers.utils.padding:no_padding_2_padding": "tensor, data",
    "verl.workers.utils.padding:response_from_nested": "tensor, response_mask",
    "verl.utils.tensordict_utils:get_non_tensor_data": "data, key, default",
    "verl.utils.tensordict_utils:assign_non_tensor": "tensor_dict, ...",
    "verl.utils.metric:Metric.from_dict": "data, aggregation",
}
_HEAD = "verl.workers.engine.fsdp.transformer_impl:FSDPEngineWithLMHead"
_KERNEL = {
    f"{_HEAD}.prepare_model_outputs": "self, output, output_args, micro_batch, ...",
    f"{_HEAD}.forward_step": "self, micro_batch, ...",
    f"{_HEAD}._gather_and_unpad_packed": "self, tensor, pad_size",
    f"{_HEAD}._get_packed_pad_size": "self, packed_length",
    "verl.utils.ulysses:ulysses_pad_and_slice_inputs": "input_ids_rmpad, position_ids_rmpad, sp_size, ...",
    "verl.utils.experimental.torch_functional:FusedLinearForPPO.forward": (
        "self, hidden_states, vocab_weights, input_ids, temperature"
    ),
    "verl.utils.kernel.linear_cross_entropy:LinearCrossEntropy.forward": (
        "ctx, hidden, weight, labels, temperature, reduction, dist_process_group"
    ),
}


_FUSED = "verl.models.mcore.model_forward_fused"
_MEGATRON = "verl.workers.engine.megatron.transformer_impl"
_SHARDED_KERNEL = {
    f"{_MEGATRON}:MegatronEngineWithLMHead.forward_step": "self, batch_iter, model, ...",
    f"{_FUSED}:preprocess_thd_engine": "input_ids, pre_process, need_roll, ...",
    f"{_FUSED}:gather_from_sequence_parallel_region": "input_, tensor_parallel_output_grad, ...",
}


def engines() -> dict[str, str]:
    """Hooks of the FSDP engine, and of the Megatron engine if verl has imported it."""
    hooks = _engine("fsdp", "FSDPEngine") | _KERNEL
    if _MEGATRON in sys.modules:
        hooks |= _engine("megatron", "MegatronEngine") | _SHARDED_KERNEL
    return hooks


def _engine(package: str, name: str) -> dict[str, str]:
    module = f"verl.workers.engine.{package}.transformer_impl"
    return {
        f"{module}:prepare_micro_batches": "data, dp_group, ...",
        f"{module}:{name}.forward_backward_batch": "self, data, loss_function, forward_only",
        f"{module}:{name}.get_data_parallel_group": "self",
    }
