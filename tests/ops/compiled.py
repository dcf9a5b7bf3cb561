"""Counts the graphs that torch.compile makes, for tests that a changed number does not compile a new one."""

from collections.abc import Callable
from typing import Any

import torch


class GraphCounter:
    """A torch.compile backend that runs the captured graph unmodified and counts captures."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return module.forward


def compile_counting(function: Callable[..., Any], **options: Any) -> tuple[Callable[..., Any], GraphCounter]:
    torch._dynamo.reset()
    counter = GraphCounter()
    return torch.compile(function, backend=counter, fullgraph=True, **options), counter
