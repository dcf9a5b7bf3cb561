"""Processes of one gloo process group, that tests give functions to run."""

import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Between a call and its last answer; a collective that hangs ends in half of it.
_SECONDS = 600


# They start as forks of a process that has imported the modules of the tests, and has no threads yet.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "entropy_rl_ext", "entropy_rl.train"])


class Ranks:
    """`size` processes, alive until `close`; each has `torch.distributed` with as many ranks."""

    def __init__(self, size: int, directory: Path) -> None:
        pipes = [_CONTEXT.Pipe() for _ in range(size)]
        store = str(directory / f"store_of_{size}")
        self._processes = [
            _CONTEXT.Process(target=_serve, args=(rank, size, store, pipe[1]), daemon=True)
            for rank, pipe in enumerate(pipes)
        ]
        self._connections = [pipe[0] for pipe in pipes]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What function(*arguments) returns on each rank. It is found by its module and name."""
        for connection in self._connections:
            connection.send((function, arguments))
        answers = []
        for rank, connection in enumerate(self._connections):
            assert connection.poll(_SECONDS), f"rank {rank} does not answer"
            answers.append(connection.recv())
        errors = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
        assert not errors, "\n".join(errors)
        return [result for _, result in answers]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, size: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=_SECONDS / 2),
    )
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:  # the tests have ended
            return
        try:
            connection.send((True, function(*arguments)))
        except Exception:
            connection.send((False, traceback.format_exc()))
