"""Start a function in two processes that form one group, as torchrun would."""

import os
import time
from collections.abc import Callable
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess

import torch


def member(rank: int, port: int, call: Callable, *arguments) -> None:
    """Call as one of two processes on the CPU, with one thread."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    call(rank, *arguments)


def start_pair(context: BaseContext, call: Callable, *arguments) -> list[BaseProcess]:
    """Two started processes that run call(rank, *arguments)."""
    port = 20000 + (os.getpid() + time.monotonic_ns() // 1000) % 20000
    pair = [
        context.Process(target=member, args=(rank, port, call, *arguments))
        for rank in (0, 1)
    ]
    for process in pair:
        process.start()
    return pair
