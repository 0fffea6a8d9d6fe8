"""Worker processes that end with their parent, however it ends, and leave signals to it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, connection, get_context, parent_process
from typing import Any


def pool(count: int, prepare: Callable[..., None], *arguments: Any) -> ProcessPoolExecutor:
    """A pool of `count` processes, in each of which `prepare(*arguments)` is called first.

    They are started anew, not forked: forks of a process with threads (gloo, CUDA) may hang.
    """
    return ProcessPoolExecutor(
        count, get_context("spawn"), initializer=_begin, initargs=(prepare, arguments)
    )


def end(pool: ProcessPoolExecutor) -> None:
    """Ends the processes at once, whatever they are doing; leaving the pool would wait for them."""
    pool.shutdown(wait=False, cancel_futures=True)
    for process in active_children():
        process.terminate()


def _begin(prepare: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare(*arguments)


def _end_with_parent() -> None:
    # A parent that is killed cannot end its workers, which would wait for it for ever.
    connection.wait([parent_process().sentinel])
    os._exit(1)
