"""Computes gradients and metrics of one optimizer step of verl's Megatron engine for each of CASES. Run by torchrun:

torchrun --nproc-per-node 4 megatron_step.py OUTPUT [CASE...]

On a CPU, Megatron Core has no attention for packed sequences and no norm for sequence parallelism, its schedule of
micro-batches and its collectives allocate on CUDA, and so does its state of random numbers, which nothing here draws.
This file replaces these. All else is Megatron Core's (embeddings, linear layers and their collectives) or verl's (the
engine's steps, the packing, the fused forward).
"""

import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import optimizer_step
import torch
import torch.distributed as dist
from torch import Tensor, nn

VOCAB = 97  # entries of the tokenizer; Megatron pads them
PADDED = 104

# For each case the size of tensor parallelism, the head (ours, or a plain statement of it), whether it is tied to the
# embeddings, and overrides under actor_rollout_ref.actor.
SELECTED = {"entropy_top_scope": "mini_batch", "entropy_top_ranks": "global"}
CASES: dict[str, tuple[int, str, bool, dict[str, Any]]] = {
    f"{scope}-{'tied' if tied else 'untied'}-{size}-{head}": (size, head, tied, overrides)
    for scope, overrides in {
        "selected": SELECTED,
        "bonus": SELECTED | {"entropy_coeff": 0.01},
    }.items()
    for tied in (False, True)
    for size, head in ((1, "plain"), (2, "ours"), (4, "ours"))
} | {
    # Each rank has all hidden states.
    "selected-tied-replicated-2-ours": (2, "ours", True, SELECTED | {"megatron.sequence_parallel": False}),
}


class Norm(nn.Module):
    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Causal attention within each packed sequence: [tokens, heads, D] to [tokens, heads * D]."""

    def __init__(self, config: Any, **_: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: Any, **__: Any) -> Tensor:
        lengths = packed_seq_params.cu_seqlens_q_padded.diff()
        sequence = torch.arange(len(lengths)).repeat_interleave(lengths)
        mask = (sequence[:, None] == sequence).tril()
        heads_first = (x.transpose(0, 1) for x in (query, key, value))
        return nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(0, 1).flatten(1)


def build_model(size: int, tied: bool, sequence_parallel: bool) -> Any:
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=4,
        ffn_hidden_size=64,
        use_cpu_initialization=True,
        tensor_model_parallel_size=size,
        sequence_parallel=sequence_parallel,
        params_dtype=torch.float64,
        pipeline_dtype=torch.float64,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        add_bias_linear=False,
        init_method_std=0.2,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
    )
    layer = get_gpt_layer_local_spec()
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    layer.submodules.self_attention.submodules.core_attention = Attention
    torch.manual_seed(0)  # Megatron draws all of a weight on each rank, and keeps the rank's shard
    model = GPTModel(
        config,
        TransformerBlockSubmodules(layer_specs=[layer] * config.num_layers, layer_norm=Norm),
        vocab_size=PADDED,
        max_sequence_length=64,
        position_embedding_type="none",
        share_embeddings_and_output_weights=tied,
    )
    # What the padding of the vocabulary holds must not matter.
    weight = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
    first = parallel_state.get_tensor_model_parallel_rank() * len(weight)
    weight.data[max(0, VOCAB - first) :] = 7.0 if tied else torch.nan
    return model


def plain_head(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, *_: Any) -> tuple[Tensor, Tensor]:
    log_p = (hidden.flatten(0, -2) @ weight[:VOCAB].T / temperature).log_softmax(-1)
    return log_p.gather(-1, labels.view(-1, 1))[:, 0], -(log_p.exp() * log_p).sum(-1)


def schedule(*, forward_step_func: Any, data_iterator: Any, model: Any, num_microbatches: int, **options: Any) -> Any:
    """In place of Megatron's: forward and backward of each micro-batch."""
    outputs = []
    for _ in range(num_microbatches):
        output, reduce = forward_step_func(data_iterator, model[0])
        loss, values = reduce(output)
        if not options["forward_only"]:
            (loss / num_microbatches).backward()
        outputs.append(values)
    return outputs


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Any:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def run(size: int, head: str, tied: bool, overrides: dict[str, Any]) -> dict[str, Any]:
    from hydra import compose, initialize_config_module
    from megatron.core import parallel_state
    from verl.models.mcore import model_forward_fused
    from verl.utils.config import omega_conf_to_dataclass
    from verl.utils.metric import Metric
    from verl.workers.engine.megatron import transformer_impl

    import entropy_rl.integrations.verl.engine as ours
    from entropy_rl.integrations.verl.loss import ppo_loss

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose(
            "ppo_trainer",
            overrides=[
                "model_engine=megatron",
                "actor_rollout_ref.model.use_fused_kernels=true",
                *(
                    f"actor_rollout_ref.actor.{key}={value}"
                    for key, value in {
                        "megatron.tensor_model_parallel_size": size,
                        "megatron.use_remove_padding": True,
                        "ppo_micro_batch_size_per_gpu": 1,
                        "entropy_top_ratio": 0.2,
                        "entropy_top_source": "old_policy",
                    }.items()
                ),
                *(f"actor_rollout_ref.actor.{key}={value}" for key, value in overrides.items()),
            ],
        )
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    model = build_model(size, tied, actor.megatron.sequence_parallel)
    model_forward_fused.patch_fused_forward(model)

    engine = object.__new__(transformer_impl.MegatronEngineWithLMHead)  # its __init__ needs CUDA
    engine.engine_config, engine.tf_config, engine.module = actor.megatron, model.config, [model]
    engine.engine_config.use_fused_kernels = True
    engine.enable_routing_replay = False
    engine.model_config = SimpleNamespace(
        hf_config=optimizer_step.qwen3_config(),
        tokenizer=SimpleNamespace(pad_token_id=0),
        mtp=SimpleNamespace(enable=False),
    )

    replicas = parallel_state.get_data_parallel_world_size()
    share = optimizer_step.ROWS // replicas
    first = parallel_state.get_data_parallel_rank() * share
    data = optimizer_step.batch(list(range(first, first + share)), {"model.use_fused_kernels": True}, 2)
    head_rows = []
    op = ours.linear_logprob_entropy

    def count(*args: Any, mask: Any = None, **options: Any) -> Any:
        head_rows.append(int(mask.sum()))
        return op(*args, mask=mask, **options)

    plain = plain_head if head == "plain" else model_forward_fused.linear_cross_entropy
    with (
        patched(transformer_impl, "get_forward_backward_func", lambda: schedule),
        patched(model_forward_fused, "linear_cross_entropy", plain),
        patched(ours, "linear_logprob_entropy", count),
    ):
        output = engine.forward_backward_batch(data, partial(ppo_loss, config=actor))
    metrics = [None] * dist.get_world_size()
    dist.all_gather_object(metrics, output["metrics"])
    result = {
        "gradients": {name: full_gradient(p, size) for name, p in model.named_parameters()},
        # As verl collects them: from one rank of each group that shares its rows.
        "metrics": {
            name: Metric.aggregate_dp([each[name] for each in metrics[::size]])
            for name, value in metrics[0].items()
            if isinstance(value, Metric)
        },
        "head_rows": head_rows,
    }
    parallel_state.destroy_model_parallel()
    return result


def full_gradient(parameter: Any, size: int) -> Tensor:
    """The unsharded gradient, averaged over the data as Megatron does it."""
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    gradient = parameter.grad.clone()
    if getattr(parameter, "sequence_parallel", False):  # each rank has the gradient of its own rows
        dist.all_reduce(gradient, group=group)
    if getattr(parameter, "tensor_model_parallel", False) and size > 1:
        shards = [torch.empty_like(gradient) for _ in range(size)]
        dist.all_gather(shards, gradient.contiguous(), group=group)
        gradient = torch.cat(shards, parameter.partition_dim)
    dist.all_reduce(gradient, group=parallel_state.get_data_parallel_group())
    return gradient / parallel_state.get_data_parallel_world_size()


def main(output: str, *names: str) -> None:
    dist.init_process_group("gloo")
    import verl.workers.engine.megatron.transformer_impl  # noqa: F401  # as a worker does before its configuration
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    with (
        patched(torch.cuda, "current_device", lambda: "cpu"),
        patched(CudaRNGStatesTracker, "fork", lambda *_: nullcontext()),
    ):
        results = {name: run(*case) for name, case in CASES.items() if not names or name in names}
    if dist.get_rank() == 0:
        torch.save(results, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
