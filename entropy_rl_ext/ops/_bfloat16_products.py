"""Products of bfloat16 matrices on the CPU with a float32 result.

PyTorch has them as a precision of its float32 products: oneDNN rounds the factors to bfloat16, multiplies them with AMX
and sums in float32. Factors that were bfloat16 before are multiplied exactly. With AVX512-BF16 alone oneDNN stays in
float32.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_users = 0  # threads within bfloat16_products
_precision = ""  # before the first of them


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """PyTorch may round the factors of float32 products on the CPU to bfloat16.

    The setting is one for all threads of the process, so keep the block short. It changes nothing on a processor
    without AMX, nor where the user has set the precision to "ieee", as
    `torch.set_float32_matmul_precision("highest")` does.
    """
    global _users, _precision
    if not processor_has_amx():
        yield
        return
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _lock:
        if _users == 0:
            _precision = products.fp32_precision
            if _precision != "ieee":
                products.fp32_precision = "bf16"
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0 and _precision != "ieee":
                products.fp32_precision = _precision


@functools.cache
def processor_has_amx() -> bool:
    capabilities: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    return bool(capabilities().get("amx_bf16"))
