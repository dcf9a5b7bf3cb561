"""verl on a machine without a GPU, for tests and for trying a recipe with a tiny model.

    VERL_USE_EXTERNAL_MODULES=entropy_rl.integrations.verl.cpu python -m verl.trainer.main_ppo +entropy_rl=cpu ...

This module registers three things with verl: a platform (device cpu, collectives by gloo); the rollout backend
`hf_cpu`, a Ray actor that runs Hugging Face's `generate` and receives the trainer's weights after every step; and the
attention implementation `packed_cpu`, which takes the place of flash attention. Ray, TransferQueue, the agent loop,
FSDP2 and checkpoints are verl's own. conf/entropy_rl/cpu.yaml has the other settings that a CPU needs.
"""

import asyncio
import contextlib
import functools
import logging
import os
import types
import zlib
from collections.abc import Generator, Iterator
from typing import Any

import ray
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations import flash_attention
from transformers.masking_utils import flash_attention_mask
from verl.plugin.platform import PlatformBase, PlatformRegistry, set_platform

NAME = "hf_cpu"
ATTENTION = "packed_cpu"

logger = logging.getLogger(__name__)


class _CPUDevice(types.ModuleType):
    """torch.cpu with the functions of torch.cuda that verl calls. There is no cache, and no device memory."""

    def __getattr__(self, name: str) -> Any:
        if name in ("empty_cache", "ipc_collect", "manual_seed_all"):
            return lambda *_: None
        if name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
            return lambda *_: 0
        if name in ("get_rng_state", "set_rng_state", "manual_seed"):
            return getattr(torch, name)
        return getattr(torch.cpu, name)

    def mem_get_info(self, *_: Any) -> tuple[int, int]:
        pages = os.sysconf("SC_PAGE_SIZE")
        return os.sysconf("SC_AVPHYS_PAGES") * pages, os.sysconf("SC_PHYS_PAGES") * pages

    def get_device_name(self, *_: Any) -> str:
        return "cpu"


@PlatformRegistry.register(platform="cpu")
class CPUPlatform(PlatformBase):
    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _CPUDevice("cpu")

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return False  # verl never picks it automatically

    def current_device(self) -> Any:
        return "cpu"  # verl passes it to Tensor.to

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None: ...

    def synchronize(self, device_index: int | None = None) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None: ...

    def empty_cache(self) -> None: ...

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None: ...

    def profiler_stop(self) -> None: ...

    def ray_resource_name(self) -> str:
        return "GPU"  # verl counts nothing else; conf/entropy_rl/cpu.yaml tells Ray there is one for each worker

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None: ...


set_platform(CPUPlatform())
# verl registers its engines for cuda and npu only. FSDP2 itself uses the platform's device.
os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")

from verl.models.transformers import monkey_patch  # noqa: E402
from verl.utils import distributed, fsdp_utils  # noqa: E402
from verl.workers.rollout.base import _ROLLOUT_REGISTRY, BaseRollout  # noqa: E402
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput  # noqa: E402

# Without this, verl asks for the backend "cpu:gloo,cpu:gloo", which torch refuses.
distributed.initialize_global_process_group_ray = functools.partial(
    distributed.initialize_global_process_group_ray, backend="gloo"
)
# verl pins the memory of a reference policy, and pinning needs an accelerator.
fsdp_utils.CPUOffloadPolicy = lambda pin_memory: CPUOffloadPolicy(pin_memory=False)


def _packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    query_length: int,
    *_: Any,
    position_ids: Tensor | None = None,
    softmax_scale: float | None = None,
    **options: Any,
) -> Tensor:
    """[B, S, heads, D], as by flash attention, for packed sequences. Each begins where position_ids, [B, S], are 0."""
    others = sorted(name for name in ("dropout", "sliding_window", "softcap", "s_aux") if options.get(name))
    if others or attention_mask is not None or position_ids is None:
        found = ", ".join(others) or ("a padded batch" if attention_mask is not None else "no position_ids")
        raise ValueError(f"attn_implementation={ATTENTION} got {found}; it takes packed sequences and causal attention")
    sequence = (position_ids == 0).cumsum(-1)
    mask = (sequence[:, :, None] == sequence[:, None, :]).tril()[:, None]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=softmax_scale, enable_gqa=True
    )
    return output.transpose(1, 2)


# verl puts Ulysses's exchange of heads and sequences around flash attention only, and then calls this name.
monkey_patch._flash_attention_forward = _packed_attention
AttentionInterface.register(ATTENTION, flash_attention.flash_attention_forward)
AttentionMaskInterface.register(ATTENTION, flash_attention_mask)


class Server:
    """A Ray actor that generates for the agent loop. It batches the requests that are waiting."""

    def __init__(self, config: Any, model_config: Any, replica_rank: int) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar
        from verl.utils.config import omega_conf_to_dataclass

        print(
            f"entropy_rl.integrations.verl.cpu: rollout {replica_rank} generates on the CPU. This backend is for tests "
            "and for trying a recipe with a tiny model. It is slow.",
            flush=True,
        )
        disable_progress_bar()  # of loading weights, in every step
        self.config = config
        model_config = omega_conf_to_dataclass(model_config)
        self.model = AutoModelForCausalLM.from_config(
            model_config.hf_config, attn_implementation="eager", dtype=torch.float32
        ).eval()
        tokenizer = model_config.tokenizer
        ends = model_config.generation_config.eos_token_id if model_config.generation_config is not None else None
        ends = ends if isinstance(ends, list) else [ends]
        self.ends = sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None})
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.ends[0]
        self.seed = config.seed + replica_rank
        self.requests = 0
        self.global_steps: int | None = None
        self.waiting: list[tuple[list[int], dict[str, Any], int, asyncio.Future[TokenOutput]]] = []
        self.running = asyncio.Lock()

    async def load_weights(self, weights: dict[str, Tensor], global_steps: int | None) -> None:
        async with self.running:
            # The names are those of a checkpoint, in which the experts of a mixture are separate tensors.
            self.model, loaded = type(self.model).from_pretrained(
                None,
                config=self.model.config,
                state_dict=weights,
                attn_implementation="eager",
                dtype=torch.float32,
                output_loading_info=True,
            )
            missing, unexpected = loaded["missing_keys"], loaded["unexpected_keys"]
            missing = set(missing) - set(self.model.all_tied_weights_keys)
            if missing or unexpected:
                raise ValueError(f"the trainer's weights lack {sorted(missing)} and also have {sorted(unexpected)}")
            self.global_steps = global_steps

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, **multimodal: Any
    ) -> TokenOutput:
        if any(value is not None for value in multimodal.values()):
            raise ValueError(f"rollout {NAME} accepts text only; it got {sorted(multimodal)}")
        self.requests += 1
        # With full_determinism the id identifies the sample, whatever the order of the requests.
        which = request_id if self.config.full_determinism else self.requests
        seed = zlib.crc32(f"{self.seed}/{self.global_steps}/{which}".encode())
        future: asyncio.Future[TokenOutput] = asyncio.get_running_loop().create_future()
        self.waiting.append((list(prompt_ids), dict(sampling_params), seed, future))
        async with self.running:
            if not future.done():
                await asyncio.sleep(0.01)  # so that requests that arrive now join the batch
                await self._run()
        return await future

    async def _run(self) -> None:
        """Answers the first waiting request and all others with the same sampling parameters."""
        params = self.waiting[0][1]
        # A batch draws its rows from one seed, so a response depends on the other requests in the batch.
        size = 1 if self.config.full_determinism else self.config.max_num_seqs
        batch = [request for request in self.waiting if request[1] == params][:size]
        self.waiting = [request for request in self.waiting if request not in batch]
        futures = [request[3] for request in batch]
        try:
            outputs = await asyncio.to_thread(self._generate, [request[0] for request in batch], params, batch[0][2])
        except Exception as error:
            for future in futures:
                future.set_exception(error)
            return
        for future, output in zip(futures, outputs, strict=True):
            future.set_result(output)

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], params: dict[str, Any], seed: int) -> list[TokenOutput]:
        longest = max(map(len, prompts))
        padded = torch.tensor([[self.pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        room = self.config.prompt_length + self.config.response_length - longest
        limit = params.get("max_tokens", min(self.config.response_length, room))
        temperature = params.get("temperature", 1.0)
        torch.manual_seed(seed)
        output = self.model.generate(
            padded,
            attention_mask=mask,
            max_new_tokens=max(1, limit),
            do_sample=temperature > 0,
            temperature=temperature or None,
            top_p=params.get("top_p", 1.0),
            top_k=max(0, params.get("top_k", -1)),
            repetition_penalty=params.get("repetition_penalty", 1.0),
            eos_token_id=self.ends,
            pad_token_id=self.pad,
            output_scores=True,
            return_dict_in_generate=True,
        )
        log_probs = self.model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
        answers = []
        for tokens, scores in zip(output.sequences[:, longest:].tolist(), log_probs.tolist(), strict=True):
            length = next((i + 1 for i, token in enumerate(tokens) if token in self.ends), len(tokens))
            answers.append(
                TokenOutput(
                    token_ids=tokens[:length],
                    log_probs=scores[:length] if params.get("logprobs") else None,
                    stop_reason="completed",
                    extra_fields={"global_steps": self.global_steps},
                )
            )
        return answers

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """Nothing to do, here and in the methods below: weights are never moved, and no cache outlives a request."""

    async def sleep(self) -> None: ...

    async def clear_kv_cache(self) -> None: ...

    async def release_kv_cache(self) -> None: ...

    async def resume_kv_cache(self) -> None: ...

    async def abort_all_requests(self, reject_request: bool = False) -> None: ...

    async def resume_generation(self) -> None: ...

    async def start_profile(self, **_: Any) -> None: ...

    async def stop_profile(self) -> None: ...


def _server_name(replica_rank: int) -> str:
    return f"{NAME}_server_{replica_rank}"


class Replica(RolloutReplica):
    async def launch_servers(self) -> None:
        name = _server_name(self.replica_rank)
        server = (
            ray.remote(Server)
            .options(name=name, num_cpus=0, max_concurrency=self.max_concurrency)
            .remote(self.config, self.model_config, self.replica_rank)
        )
        await server.wake_up.remote()  # returns once the model is loaded
        self.servers = [server]
        self._server_handle, self._server_address = server, name


class Rollout(BaseRollout):
    """Sends the trainer's weights. All ranks iterate over them, because gathering a weight is a collective."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any) -> None:
        super().__init__(config, model_config, device_mesh)
        self.size = self.config.tensor_model_parallel_size * self.config.data_parallel_size
        self.rank = int(os.environ["RANK"])

    async def update_weights(
        self,
        weights: Generator[tuple[str, Tensor], None, None],
        wire_format: str = "named_tensors",
        global_steps: int | None = None,
        **_: Any,
    ) -> None:
        if wire_format != "named_tensors":
            raise ValueError(f"wire_format={wire_format}: rollout {NAME} accepts named_tensors only")
        tensors = {name: weight.detach().float() for name, weight in weights}
        if self.rank % self.size == 0:
            server = ray.get_actor(_server_name(self.rank // self.size))
            await server.load_weights.remote(tensors, global_steps)

    async def resume(self, tags: list[str]) -> None: ...

    async def release(self) -> None: ...


RolloutReplicaRegistry.register(NAME, lambda: Replica)
_ROLLOUT_REGISTRY[(NAME, "async")] = f"{__name__}.Rollout"
