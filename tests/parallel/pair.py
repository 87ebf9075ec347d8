"""Processes of one gloo group that run a function and return its results."""

import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SIZE = 2
PATIENCE = 300


class Pair:
    """Runs functions in two processes that are reused by all calls, because they take seconds to start.

    With size 1 it is a single process in its own group, like one of several.
    """

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return the results of `function(*args)`, an importable function, of all processes.

        Raises:
            RuntimeError: with the traceback or exit code of each process that failed; the next call starts new ones.
        """
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = [self.answer(rank) for rank in range(self.size)]
        failures = [text for text, _ in answers if text]
        if failures:
            self.stop()
            raise RuntimeError("\n".join(failures))
        return [result for _, result in answers]

    def answer(self, rank: int) -> tuple[str, Any]:
        """Return why a process failed, or "" and its result."""
        try:
            return self.pipes[rank].recv() if self.pipes[rank].poll(PATIENCE) else (f"process {rank} hangs", None)
        except EOFError:
            self.processes[rank].join()
            return f"process {rank} died with exit code {self.processes[rank].exitcode}", None

    def start(self) -> None:
        """Start the processes, which connect on a free port."""
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        context = mp.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, self.size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def stop(self) -> None:
        """End the processes."""
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.kill()
            process.join()
            pipe.close()
        self.processes, self.pipes = [], []


def serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    """Join the group and run calls until one fails; the other process then detects that this one has ended."""
    # As set by torchrun, so that Lightning does not start more processes.
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    while True:
        function, args = pipe.recv()
        try:
            answer = function(*args)
        except Exception:
            pipe.send((f"process {rank}:\n{traceback.format_exc()}", None))
            os._exit(1)
        pipe.send(("", answer))


def refusal(function: Callable[..., Any], *args: Any) -> str:
    """Return the text of the ValueError that a function raises in every process, "" if it raises none."""
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    return ""
