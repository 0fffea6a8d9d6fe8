"""Batches made before they are asked for, by other processes; the same whoever makes them."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import torch
import workers
from data import PretrainingExamples

# Examples that a worker makes at a time.
_PIECE = 256
# What travels between processes is small; the model gets int64.
_TRAVEL = {"input_ids": np.int32, "labels": np.int32}

_examples: PretrainingExamples


def _prepare(examples: PretrainingExamples) -> None:
    global _examples
    _examples = examples
    torch.set_num_threads(1)


def _piece(first: int, count: int) -> dict[str, np.ndarray]:
    batch = _examples.batch(first, count)
    return {name: t.numpy().astype(_TRAVEL.get(name, np.int8)) for name, t in batch.items()}


class Loader:
    """Gives batches of `examples`; a context manager that ends its processes.

    Args:
        examples: Where they come from.
        processes: Worker processes; with 0 a batch is made when it is asked for.
    """

    def __init__(self, examples: PretrainingExamples, processes: int) -> None:
        self.examples = examples
        self._pool = workers.pool(processes, _prepare, examples) if processes else None
        self._coming: dict[tuple[int, int], list[Future]] = {}

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def expect(self, first: int, count: int) -> None:
        """Says which batch will be asked for, so that it is made in the meantime."""
        if self._pool and (first, count) not in self._coming:
            self._coming[first, count] = [
                self._pool.submit(_piece, start, min(_PIECE, first + count - start))
                for start in range(first, first + count, _PIECE)
            ]

    def batch(self, first: int, count: int) -> dict[str, torch.Tensor]:
        """As `PretrainingExamples.batch`."""
        if not self._pool:
            return self.examples.batch(first, count)
        self.expect(first, count)
        pieces = [future.result() for future in self._coming.pop((first, count))]
        return {
            name: torch.from_numpy(np.concatenate([piece[name] for piece in pieces])).long()
            for name in pieces[0]
        }
