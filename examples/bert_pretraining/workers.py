"""Worker processes that end with their parent, however it ends, and leave signals to it.

torchrun, timeout and batch systems send SIGTERM to all processes of a run. A worker works on for
`_GRACE` seconds then, so that the parent can finish its step; it does end, because a pool that has
lost a worker ends the others by that signal and waits for them.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, connection, get_context, parent_process
from typing import Any

_GRACE = 20.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def pool(count: int, prepare: Callable[..., None], *arguments: Any) -> ProcessPoolExecutor:
    """A pool of `count` processes, in each of which `prepare(*arguments)` is called first.

    They are started anew, not forked: forks of a process with threads (gloo, CUDA) may hang.
    """
    found = ProcessPoolExecutor(
        count, get_context("spawn"), initializer=_begin, initargs=(prepare, arguments)
    )
    # Processes inherit the mask, so that signals wait until they know what to do with them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        for _ in range(count):
            found.submit(int)  # starts one, as long as none is idle
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return found


def end(pool: ProcessPoolExecutor) -> None:
    """Ends the processes at once, whatever they are doing; leaving the pool would wait for them."""
    pool.shutdown(wait=False, cancel_futures=True)
    for process in active_children():
        process.kill()


def _begin(prepare: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare(*arguments)


def _end_later(*_: object) -> None:
    timer = threading.Timer(_GRACE, os._exit, (1,))
    timer.daemon = True
    timer.start()


def _end_with_parent() -> None:
    # A parent that is killed cannot end its workers, which would wait for it for ever.
    connection.wait([parent_process().sentinel])
    os._exit(1)
