"""Tables of addresses on the device: built once, renewed only where something moved.

Note [Stale tables]
A table is found by comparing everything it was built from with what is there now: address, layout
and dtype of every parameter and state, sizes, layout, dtype and device of every gradient. The
extension answers for a whole list of tensors. Without the extension, where all are contiguous, a
layout is the number of elements, which takes half the time to ask for; else it is sizes and
strides. Packed states also depend on their parameters' sizes, as rows do. Rows of rounding are the
same in every step.
What may differ in every step without such a move (the gradients' addresses, learning rates and
hyper-parameters) goes into `StepWords`, which is compared and copied as a whole.

Note [Graph capture]
A captured copy reads its host memory again at every replay, and captured kernels their tables. Both
are therefore kept for as long as the owner of the tables lives (for the norm, which has none, until
the process ends: some bytes per tensor and capture), and are never written again.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import attrgetter
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from maxva_kernels import layouts

from . import multi_tensor_apply as mta
from . import norm, packed_update
from .checks import DTYPES, TensorLists, blocks_per_row, row_length
from .stochastic_rounding import NEAREST, rows_of

#: Where a row has the addresses of a list of states.
_COLUMNS = {
    "m": mta.M,
    "u": mta.U,
    "v": mta.V,
    "w": mta.W,
    "vmax": mta.VMAX,
    "packed": mta.PACKED,
    "scale": mta.SCALE,
    "maximum": mta.VMAX,
    "master": mta.MASTER,
}

#: Tables kept per optimizer: subsets of parameters that take turns in having gradients.
MAX_UPDATE_TABLES = 4
#: And per device of norms, which all optimizers share; as many as csrc/maxva_cuda.cpp keeps.
MAX_NORM_TABLES = 32

_data_ptr = Tensor.data_ptr
_size = Tensor.size
_stride = Tensor.stride
_numel = Tensor.numel
_is_contiguous = Tensor.is_contiguous
_dtype = attrgetter("dtype")
_get_device = Tensor.get_device
_layout = attrgetter("layout")


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """The address of every tensor's first element.

    Raises:
        ValueError: a tensor with elements has none.
    """
    found = list(map(_data_ptr, tensors))
    if 0 in found and any(t.numel() and not _data_ptr(t) for t in tensors):
        raise ValueError("maxva: a tensor has no memory (torch's ZeroTensors have none); clone it")
    return found


def signature(lists: TensorLists) -> list[Any]:
    """Everything that a table of the update is built from; see Note [Stale tables]."""
    found: list[Any] = [list(lists.group_sizes), list(lists.rounding), list(lists.states)]
    walked = (lists.theta, *lists.states.values())
    counters = (lists.step, lists.group_step)
    if layouts.native is None:
        return found + _facts_in_python(lists, walked, counters)
    facts_of = layouts.native.facts_of
    return [*found, facts_of(lists.g, False), *(facts_of(t, True) for t in (*walked, *counters))]


def _facts_in_python(
    lists: TensorLists, walked: Sequence[Sequence[Tensor]], counters: Sequence[Sequence[Tensor]]
) -> list[Any]:
    contiguous = all(all(map(_is_contiguous, tensors)) for tensors in (lists.g, *walked))
    found: list[Any] = [lists.theta[0].device, contiguous]
    for tensors in walked:
        found.append(addresses(tensors))
        found.append(list(map(_dtype, tensors)))
        has_rows = lists.is_packed and tensors is lists.theta
        found.append(list(map(_size if has_rows or not contiguous else _numel, tensors)))
        if not contiguous:
            found.append(list(map(_stride, tensors)))
    for tensors in counters:
        found.append(addresses(tensors))
        found.append(list(map(_dtype, tensors)))
        found.append(list(map(_numel, tensors)))
    for attribute in (_size, _dtype, _get_device, *([] if contiguous else [_stride])):
        found.append(list(map(attribute, lists.g)))
    return found


def gradient_signature(g: Sequence[Tensor]) -> tuple[list[int], list[torch.dtype]] | None:
    """Numbers of elements and dtypes; None where a tensor is not contiguous or does not fit."""
    if set(map(_layout, g)) != {torch.strided} or len(set(map(_get_device, g))) != 1:
        return None
    dtypes = list(map(_dtype, g))
    if not set(dtypes) <= set(DTYPES) or not all(map(_is_contiguous, g)):
        return None
    return list(map(_numel, g)), dtypes


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _pinned(device: torch.device) -> bool:
    return device.type == "cuda"


class Uploads:
    """Copies of host words to one device, and the host memory that captured copies need."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spare: Tensor | None = None
        self._held: list[Tensor] = []

    def prepare_capture(self, num_words: int) -> None:
        """Sets host memory aside: allocating it during a capture may be refused."""
        if _pinned(self._device) and (self._spare is None or self._spare.numel() < num_words):
            self._spare = torch.empty(num_words, dtype=torch.int64, device="cpu", pin_memory=True)

    def copy(self, words: list[int]) -> Tensor:
        """An int64 tensor of `words` on the device; the copy is asynchronous."""
        if not _pinned(self._device):
            return torch.tensor(words, dtype=torch.int64, device=self._device)
        spare = self._spare if is_capturing(self._device) else None
        if spare is None or spare.numel() < len(words):
            return self.copy_tensor(_host_words(words))
        self._spare = None
        return self._to_device(spare[: len(words)].copy_(_host_words(words)))

    def copy_tensor(self, host: Tensor) -> Tensor:
        """The same of a tensor of any dtype."""
        if not _pinned(self._device):
            return host
        pinned = torch.empty(host.shape, dtype=host.dtype, device="cpu", pin_memory=True)
        return self._to_device(pinned.copy_(host))

    def _to_device(self, pinned: Tensor) -> Tensor:
        # the pinned allocator reuses this memory only after the copy is done
        if is_capturing(self._device):
            self._held.append(pinned)
        return pinned.to(self._device, non_blocking=True)


def _host_words(words: Sequence[int]) -> Tensor:
    # whatever the default device is
    return torch.tensor(words, dtype=torch.int64, device="cpu")


class StepWords:
    """The words of one step on the device, copied only if they differ from the last step's.

    Threads may share them, see `Tables`.
    """

    def __init__(self, uploads: Uploads) -> None:
        self._uploads = uploads
        self._words: list[Any] = []
        self._copy: Tensor | None = None
        self._stream: int | None = None
        self._lock = threading.Lock()

    def on_device(self, words: list[int], stream: int | None, capturing: bool) -> Tensor:
        with self._lock:
            if capturing:
                return self._uploads.copy(words)
            self._uploads.prepare_capture(len(words))
            if self._copy is None or words != self._words or stream != self._stream:
                self._copy = self._uploads.copy(words)
                self._words, self._stream = words, stream
            return self._copy


class _Table:
    """What tables of both kinds share: who may read their device tensors, and when."""

    def __init__(self, device: torch.device, tensors: Sequence[Tensor], uploads: Uploads) -> None:
        self.device = device
        self.step_words = StepWords(uploads)
        self._tensors = tensors
        self._ready: torch.cuda.Event | None = None
        self._streams: set[int] = set()
        if device.type == "cuda" and not is_capturing(device):
            stream = torch.cuda.current_stream(device)
            self._ready = torch.cuda.Event()
            self._ready.record(stream)
            self._streams.add(stream.cuda_stream)

    def use_on_current_stream(self, capturing: bool) -> int | None:
        """Orders the tables' copy before what this stream does next; returns the stream."""
        if self.device.type != "cuda":
            return None
        stream = torch.cuda.current_stream(self.device)
        # torch synchronises before it begins a capture, and what is captured is held
        if not capturing and stream.cuda_stream not in self._streams:
            if self._ready is not None:
                stream.wait_event(self._ready)
            for tensor in self._tensors:
                tensor.record_stream(stream)
            self._streams.add(stream.cuda_stream)
        return stream.cuda_stream


def _chunk_map(units: Sequence[int], chunk: int) -> tuple[list[int], Tensor]:
    """The chunk after the last of every tensor of so many units, and the tensor of every chunk.

    The latter int32 on the CPU: a list would take a fifth of a second where there are millions.
    """
    counts = [-(-count // chunk) for count in units]
    tensors = torch.arange(len(units), dtype=torch.int32, device="cpu")
    return list(accumulate(counts)), tensors.repeat_interleave(_host_words(counts))


@dataclass
class Combination:
    """The tensors of one combination of dtypes and way of rounding: one launch.

    Attributes:
        rows: int64 [num_tensors, ROW] of multi_tensor_apply.py.
        is_stochastic: theta is not rounded to the nearest.
        rounding: int64 [num_tensors, ROUNDING_FIELDS] of stochastic_rounding.py; None: nothing has
            random bits.
        chunk_tensor: int32 [num_chunks], the row of each chunk's tensor.
    """

    theta_dtype: torch.dtype
    g_dtype: torch.dtype
    rows: Tensor
    is_stochastic: bool
    rounding: Tensor | None
    chunk_tensor: Tensor
    num_tensors: int
    num_chunks: int


class UpdateTable(_Table):
    """Where the parameters, states and counters of one call lie.

    Attributes:
        needs_fitting: a tensor is not laid out as its parameter; then there are no tables.
        combinations: one per combination of parameter and gradient dtype and way of rounding.
        steps, group_steps: int64 addresses of the counters.
    """

    def __init__(self, lists: TensorLists, needs_fitting: bool) -> None:
        device = lists.theta[0].device
        self.needs_fitting = needs_fitting
        self.combinations: list[Combination] = []
        uploads = Uploads(device)
        if not needs_fitting:
            self._build(lists, uploads)
        tensors = [t for c in self.combinations for t in (c.rows, c.chunk_tensor)]
        tensors += [c.rounding for c in self.combinations if c.rounding is not None]
        if not needs_fitting:
            tensors += [self.steps, self.group_steps]
        super().__init__(device, tensors, uploads)

    def _build(self, lists: TensorLists, uploads: Uploads) -> None:
        n = len(lists.theta)
        columns = {mta.THETA.value: addresses(lists.theta)}
        for name, tensors in lists.states.items():
            columns[_COLUMNS[name].value] = addresses(tensors) if tensors else [0] * n
        columns[mta.NUMEL.value] = units = [theta.numel() for theta in lists.theta]
        chunk = mta.CHUNK.value
        if lists.is_packed:
            columns[mta.ROW_LENGTH.value] = list(map(row_length, lists.theta))
            units = [theta.shape[0] * blocks_per_row(theta) for theta in lists.theta]
            columns[mta.NUM_BLOCKS.value] = units
            chunk = packed_update.CHUNK_BLOCKS.value
        columns[mta.STEP.value] = addresses(lists.step)
        columns[mta.GROUP.value] = [
            group for group, size in enumerate(lists.group_sizes) for _ in range(size)
        ]
        columns[mta.INDEX.value] = list(range(n))
        rounding = rows_of(lists.rounding) or [NEAREST] * n
        members: dict[tuple[torch.dtype, torch.dtype, bool], list[int]] = {}
        for i, (theta, g) in enumerate(zip(lists.theta, lists.g, strict=True)):
            kind = theta.dtype, g.dtype, rounding[i].is_stochastic()
            members.setdefault(kind, []).append(i)
        for (theta_dtype, g_dtype, is_stochastic), indices in members.items():
            ends, tensor_of = _chunk_map([units[i] for i in indices], chunk)
            words: list[int] = []
            for first, end, i in zip([0, *ends], ends, indices, strict=False):
                row = {field: column[i] for field, column in columns.items()}
                row[mta.FIRST_CHUNK.value], row[mta.END_CHUNK.value] = first, end
                words += [row[field] for field in range(mta.ROW.value)]
            self.combinations.append(
                Combination(
                    theta_dtype,
                    g_dtype,
                    uploads.copy(words),
                    is_stochastic,
                    uploads.copy([word for i in indices for word in rounding[i]])
                    if is_stochastic or lists.is_packed
                    else None,
                    uploads.copy_tensor(tensor_of),
                    len(indices),
                    len(tensor_of),
                )
            )
        self.steps = uploads.copy(addresses(lists.step))
        self.group_steps = uploads.copy(addresses(lists.group_step))


@dataclass
class NormCombination:
    """Gradients of one dtype: one launch of the norm; see Combination."""

    g_dtype: torch.dtype
    rows: Tensor
    chunk_tensor: Tensor
    num_chunks: int


class NormTable(_Table):
    """How gradients of given sizes and dtypes are cut into chunks; holds no address."""

    def __init__(
        self, device: torch.device, numels: Sequence[int], dtypes: Sequence[torch.dtype]
    ) -> None:
        uploads = Uploads(device)
        self.combinations: list[NormCombination] = []
        for g_dtype in dict.fromkeys(dtypes):
            indices = [i for i, dtype in enumerate(dtypes) if dtype == g_dtype]
            ends, tensor_of = _chunk_map([numels[i] for i in indices], norm.NORM_CHUNK.value)
            words: list[int] = []
            for first, i in zip([0, *ends], indices, strict=False):
                words += [numels[i], first, i]
            self.combinations.append(
                NormCombination(
                    g_dtype,
                    uploads.copy(words),
                    uploads.copy_tensor(tensor_of),
                    len(tensor_of),
                )
            )
        tensors = [t for c in self.combinations for t in (c.rows, c.chunk_tensor)]
        super().__init__(device, tensors, uploads)


TableT = TypeVar("TableT", bound=_Table)


class Tables(Generic[TableT]):
    """The last few tables of one owner, and all that a captured graph reads.

    The norm's owner is the process, whose threads may ask at a time.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._recent: list[tuple[list[Any], TableT]] = []
        self._captured: list[TableT] = []
        self._lock = threading.Lock()

    def find(self, found: list[Any], device: torch.device, build: Callable[[], TableT]) -> TableT:
        """The table built from what has this signature, or a new one."""
        capturing = is_capturing(device)
        with self._lock:
            known = (k for k, (built_from, _) in enumerate(self._recent) if built_from == found)
            k = next(known, None)
            entry = (found, build()) if k is None else self._recent.pop(k)
            table = entry[1]
            # one built in a capture is filled by the graph alone
            if k is not None or not capturing:
                self._recent.insert(0, entry)
                del self._recent[self._capacity :]
            if capturing and not any(table is held for held in self._captured):
                self._captured.append(table)
            return table


def double_words(values: Sequence[float]) -> list[int]:
    """The bits of float64 values, to travel with addresses."""
    return list(struct.unpack(f"{len(values)}q", struct.pack(f"{len(values)}d", *values)))
