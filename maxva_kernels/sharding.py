"""Tensors and norms that are divided over ranks: the one file that knows DTensor and groups.

A backend gets plain tensors; a sum over all elements of a parameter, or of all gradients, is
completed here by collectives. Every rank calls them in the same order and with the same shapes,
whatever gradients it holds. A step over plain tensors on one rank passes through untouched.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from maxva_kernels.batch import STATE_KEYS, Batch, Statistic
from maxva_kernels.compact import BLOCK, num_blocks
from maxva_kernels.hyper import describe
from maxva_kernels.layouts import SHAPE, agree, rows_are_dense

#: Fields of a Batch that are divided as their parameter is, with the names users know.
_LIKE_PARAMETER = {"g": "gradient", **STATE_KEYS}


def _dtensor() -> type[Any] | None:
    """DTensor, or None where nobody has imported it: then there are none, and no import is paid."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    cls = _dtensor()
    return cls is not None and isinstance(tensor, cls)


def holds_dtensor(tensors: list[Tensor]) -> bool:
    """Whether any tensor is a DTensor."""
    cls = _dtensor()
    return cls is not None and _holds(cls, tensors)


def is_made_of_others(tensor: Tensor) -> bool:
    """Whether an operator is called once per inner tensor: a wrapper subclass, but no DTensor."""
    return is_traceable_wrapper_subclass(tensor) and not holds_dtensor([tensor])


def _holds(cls: type[Any], tensors: list[Tensor]) -> bool:
    """Whether any tensor is a DTensor; a hot path, as every step of plain tensors asks it."""
    return any(issubclass(kind, cls) for kind in set(map(type, tensors)))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; another tensor as it is."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def check_placement(described: str, p: Tensor, name: str, tensor: Tensor) -> None:
    """Raises ValueError unless a tensor is divided over ranks exactly as its parameter p is."""
    if division(tensor) != division(p):
        raise ValueError(
            f"{described}: {name} is {_placement(tensor)}, but the parameter is {_placement(p)}. "
            f"Load states of sharded parameters with torch.distributed.checkpoint.state_dict."
            f"set_optimizer_state_dict, which places them"
        )


def division(tensor: Any) -> tuple[Any, ...] | None:
    """Over which ranks a DTensor is divided, and how; None of a plain tensor."""
    return _division(_dtensor(), tensor)


def _division(cls: type[Any] | None, tensor: Any) -> tuple[Any, ...] | None:
    is_divided = cls is not None and isinstance(tensor, cls)
    return (tensor.device_mesh, tensor.placements) if is_divided else None


def _placement(tensor: Any) -> str:
    if not is_dtensor(tensor):
        return "a plain tensor"
    return f"a DTensor of placement {tensor.placements} on {tensor.device_mesh}"


def _divided_dims(p: Any) -> list[int]:
    """The mesh dimensions over which a DTensor's elements are divided.

    Not by `Placement.is_shard`: the _StridedShard of FSDP2 with tensor parallelism is none.
    """
    if p.device_mesh.get_coordinate() is None:
        return []
    return [
        dim
        for dim, placement in enumerate(p.placements)
        if not placement.is_replicate() and p.device_mesh.size(dim) > 1
    ]


class NormGroup:
    """The `norm_process_group` of an optimizer: its copies share it, a pickle cannot hold it.

    Raises:
        TypeError: not a process group that this rank belongs to.
    """

    def __init__(self, group: Any) -> None:
        if not torch.distributed.is_available() or not isinstance(
            group, torch.distributed.ProcessGroup
        ):
            raise TypeError(
                f"norm_process_group must be None or a torch.distributed.ProcessGroup that this "
                f"rank belongs to, is {group!r}"
            )
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> NormGroup:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an optimizer with norm_process_group cannot be pickled, as process groups belong to "
            "their process; save optimizer.state_dict() and construct the optimizer anew"
        )


class Sharding:
    """How an optimizer's parameters are divided over ranks, and the sums over those ranks.

    Made anew for every step: `param_groups` may have been exchanged, as by `fully_shard`.

    Args:
        param_groups: the optimizer's.
        norm_group: its norm_process_group, or None.

    Raises:
        ValueError: a parameter is a DTensor whose placement is Partial.
        NotImplementedError: FSDP1 has flattened a parameter and an option needs its norm.
    """

    def __init__(self, param_groups: list[dict[str, Any]], norm_group: NormGroup | None) -> None:
        self._param_groups = param_groups
        self._norm_group = None if norm_group is None else norm_group.group
        # every process group once, in the order in which all ranks meet it
        self._process_groups: dict[str, Any] = {}
        # per divided parameter, by id: its row in tables of norms, and its groups' names
        self._row_of: dict[int, int] = {}
        self._names: list[tuple[str, ...]] = []
        self._check_flattened()
        cls = _dtensor()
        if cls is not None:
            self._find_divided(cls)

    def _check_flattened(self) -> None:
        """FSDP1 hands out flat shards as plain tensors: their norms would silently be parts."""
        if "torch.distributed.fsdp" not in sys.modules:
            return
        for group in self._param_groups:
            options = {
                "trust_ratio": group["trust_ratio"],
                "max_grad_norm": group["max_grad_norm"] is not None and self._norm_group is None,
                "skip_nonfinite": group["skip_nonfinite"] and self._norm_group is None,
                "collect_stats": group["collect_stats"] and self._norm_group is None,
            }
            wanted = [name for name, is_wanted in options.items() if is_wanted]
            for index, p in enumerate(group["params"] if wanted else ()):
                if getattr(p, "_fsdp_flattened", False):
                    raise NotImplementedError(
                        f"{describe(group, index, p)} is a shard of FSDP1, whose norm is not "
                        f"known here: {', '.join(wanted)} cannot be used. Use fully_shard (FSDP2); "
                        f"or, for all but trust_ratio and where parameters are fully sharded, "
                        f"norm_process_group="
                    )

    def _find_divided(self, cls: type[Any]) -> None:
        known: dict[Any, tuple[str, ...]] = {}
        for group in self._param_groups:
            for index, p in enumerate(group["params"] if _holds(cls, group["params"]) else ()):
                if not isinstance(p, cls):
                    continue
                key = id(p.device_mesh), p.placements
                if key not in known:
                    if any(placement.is_partial() for placement in p.placements):
                        raise ValueError(
                            f"{describe(group, index, p)} is {_placement(p)}; a parameter must "
                            f"be sharded or replicated in every mesh dimension"
                        )
                    found = [p.device_mesh.get_group(dim) for dim in _divided_dims(p)]
                    known[key] = tuple(g.group_name for g in found)
                    self._process_groups.update(zip(known[key], found, strict=True))
                if known[key]:
                    self._row_of[id(p)] = len(self._names)
                    self._names.append(known[key])

    @property
    def spans_ranks(self) -> bool:
        """Whether other ranks hold parts of what is summed, so that all must join a collective."""
        return bool(self._process_groups) or self._norm_group is not None

    def localize(self, batches: list[Batch], unscales: bool) -> None:
        """Replaces all DTensors in batches by this rank's parts, which share their memory.

        A gradient of another placement than its parameter's (Partial, as of a replicated weight
        under sequence parallelism) is redistributed, as torch's own optimizers do; `p.grad` stays.

        Raises:
            ValueError: a state is not placed as its parameter; only one of parameter and gradient
                is a DTensor; or a gradient would be both redistributed and unscaled in place.
                Nothing has been sent then.
        """
        cls = _dtensor()
        if cls is None:
            return
        batches = [b for b in batches if _holds(cls, b.theta) or _holds(cls, b.g)]
        strays: list[tuple[list[Tensor], int, Any, Any]] = []
        for batch in batches:
            if not agree(map(SHAPE, batch.g), map(SHAPE, batch.theta)):
                # parts on this rank may agree nevertheless
                raise ValueError("a gradient has another shape than its parameter")
            of_parameters = [_division(cls, p) for p in batch.theta]
            for field in _LIKE_PARAMETER:
                tensors = getattr(batch, field)
                found = [_division(cls, tensor) for tensor in tensors]
                if not tensors or found == of_parameters:  # a list at a time, as it is a hot path
                    continue
                for i, p in enumerate(batch.theta):
                    if found[i] != of_parameters[i]:
                        self._check_redistributable(p, field, tensors[i], unscales)
                        strays.append((tensors, i, tensors[i], p))
        for tensors, i, tensor, p in strays:
            tensors[i] = tensor.redistribute(p.device_mesh, p.placements)
        for batch in batches:
            for field in _LIKE_PARAMETER:
                tensors = getattr(batch, field)
                tensors[:] = [t.to_local() if isinstance(t, cls) else t for t in tensors]
            here = [(i, p) for i, p in enumerate(batch.theta) if isinstance(p, cls)]
            batch.rows = {i: self._row_of[id(p)] for i, p in here if id(p) in self._row_of}
            # the operators count up what they write, but do not see the DTensor around it
            torch.autograd.graph.increment_version([p for _, p in here])
            for i, p in here:
                batch.theta[i] = p.to_local()

    def _check_redistributable(self, p: Any, field: str, tensor: Any, unscales: bool) -> None:
        """Raises ValueError unless a tensor placed otherwise can be sent to p's placement."""
        described = next(
            describe(group, index, p)
            for group in self._param_groups
            for index, other in enumerate(group["params"])
            if other is p
        )
        if field != "g":
            check_placement(described, p, _LIKE_PARAMETER[field], tensor)
        mismatch = f"{described} is {_placement(p)}, its gradient {_placement(tensor)}"
        if not (is_dtensor(p) and is_dtensor(tensor) and p.device_mesh == tensor.device_mesh):
            raise ValueError(f"{mismatch}; both must be DTensors of one mesh, or plain tensors")
        if unscales:
            raise ValueError(
                f"{mismatch}; it cannot be unscaled in place, call scaler.unscale_ first"
            )

    def on_any_rank(self, flag: bool) -> bool:
        """Whether `flag` holds on any of the ranks. Waits for the device."""
        if not self.spans_ranks:
            return flag
        value = torch.tensor([float(flag)], device=self._device())
        for group in self._process_groups.values():
            value = self._all_reduce(value, group)
        if self._norm_group is not None:
            value = self._all_reduce(value, self._norm_group)
        return bool(value)

    def control_sums(
        self,
        batches: list[Batch],
        sum_of_squares: Callable[[torch.device, list[Tensor]], Tensor] | None,
        found_inf: Any,
    ) -> tuple[Tensor | None, Any]:
        """The sum of squares of all gradients on all ranks, and a found_inf that all ranks share.

        One collective per process group. Each gradient's part is summed over the groups that
        divide it; what is whole on every rank counts once.

        Args:
            batches: this rank's, localized.
            sum_of_squares: for gradients on one device, float64 [1] there; None if not needed.
            found_inf: a scaler's tensor, its 0 (no gradient here), or None without a scaler.

        Returns:
            float64 [1], None if not needed or there is nothing to sum; and found_inf, > 0 if it
            is on any rank (torch reduces it over the mesh of the first gradient only).
        """
        found: dict[tuple[str, ...], Tensor] = {}
        if sum_of_squares is not None:
            for (names, device), gradients in self._by_division(batches).items():
                value = sum_of_squares(device, gradients)
                if names in found:
                    value = found[names] + value.to(found[names].device, non_blocking=True)
                found[names] = value
        if not self.spans_ranks:
            return found.get(()), found_inf
        device = self._device()
        zero = torch.zeros(1, dtype=torch.float64, device=device)
        sums = {  # in the same order on all ranks, that their totals have the same bits
            names: found[names].to(device) if names in found else zero
            for names in (dict.fromkeys((*self._names, ())) if sum_of_squares is not None else ())
        }
        if found_inf is not None:
            found_inf = torch.as_tensor(found_inf).to(zero).reshape(1)
        tail = [] if found_inf is None else [found_inf]
        for name, group in self._process_groups.items():
            divided = [names for names in sums if name in names]
            if divided or tail:
                values = torch.cat([*(sums[names] for names in divided), *tail])
                parts = self._all_reduce(values, group).chunk(len(values))
                sums.update(zip(divided, parts, strict=False))
                tail = list(parts[len(divided) :])
        total = [torch.cat(list(sums.values())).sum(0, keepdim=True)] if sums else []
        if self._norm_group is not None and (total or tail):
            values = torch.cat(total + tail)
            parts = self._all_reduce(values, self._norm_group).chunk(len(values))
            total, tail = list(parts[: len(total)]), list(parts[len(total) :])
        return (total[0] if total else None), (tail[0] if tail else None)

    def _by_division(
        self, batches: list[Batch]
    ) -> dict[tuple[tuple[str, ...], torch.device], list[Tensor]]:
        lists: dict[tuple[tuple[str, ...], torch.device], list[Tensor]] = {}
        for batch in batches:
            if not batch.rows:
                lists.setdefault(((), batch.device), []).extend(batch.g)
                continue
            for i, g in enumerate(batch.g):
                names = self._names[batch.rows[i]] if i in batch.rows else ()
                lists.setdefault((names, batch.device), []).append(g)
        return lists

    def sum_norms(self, norms: Iterable[tuple[Batch, Tensor]]) -> None:
        """Completes the norms of divided parameters, in place; one collective per process group.

        Not over norm_process_group: there every parameter is whole on its rank.

        Args:
            norms: per batch float64 [parameters, 2], the sums of squares of this rank's parts.
        """
        if self._process_groups:
            self._complete(2, [(batch.rows, values) for batch, values in norms])

    def sum_statistics(self, tables: list[tuple[list[Tensor], Tensor]]) -> None:
        """Completes sums over the elements of divided parameters, in place.

        Args:
            tables: parameters, and float64 [parameters, len(Statistic)] of this rank's parts.
        """
        if self._process_groups:
            rows = self._row_of
            self._complete(
                len(Statistic),
                [
                    ({i: rows[id(p)] for i, p in enumerate(params) if id(p) in rows}, values)
                    for params, values in tables
                ],
            )

    def sum_over_norm_group(self, values: Tensor) -> Tensor:
        """The sum over the ranks of norm_process_group; without one, `values`."""
        return values if self._norm_group is None else self._all_reduce(values, self._norm_group)

    def _complete(self, width: int, tables: list[tuple[dict[int, int], Tensor]]) -> None:
        """Sums rows over ranks, in place: per table {its row: row among divided parameters}."""
        device = self._device()
        table = torch.zeros(len(self._names), width, dtype=torch.float64, device=device)
        places = [
            (values, _index(tuple(rows), values.device), _index(tuple(rows.values()), device))
            for rows, values in tables
            if rows
        ]
        for values, here, there in places:
            table[there] = values[here].to(device)
        for name, group in self._process_groups.items():
            divided = tuple(row for row, names in enumerate(self._names) if name in names)
            rows_of_group = _index(divided, device)
            table[rows_of_group] = self._all_reduce(table[rows_of_group], group)
        for values, here, there in places:
            values[here] = table[there].to(values.device)

    @property
    def devices(self) -> list[torch.device]:
        """Where sums over ranks are made, also on a rank without a gradient; empty on one rank."""
        return [self._device()] if self.spans_ranks else []

    def _device(self) -> torch.device:
        params = (p for group in self._param_groups for p in group["params"])
        first = next((p for p in params if not self._row_of or id(p) in self._row_of), None)
        return _device_of(self._norm_group) if first is None else torch.device(first.device)

    def _all_reduce(self, values: Tensor, group: Any) -> Tensor:
        """The sum over a group's ranks, on the device of `values`."""
        device = values.device
        # NCCL alone sends nothing from the CPU; and a rank without parameters has to meet others
        if group is self._norm_group or device.type not in _device_types(group):
            device = _device_of(group)
        moved = values.to(device)
        torch.distributed.all_reduce(moved, group=group)
        return moved.to(values.device)


def _device_types(group: Any) -> list[str]:
    return [torch.device(kind).type for kind in group._device_types]


def _device_of(group: Any) -> torch.device:
    """A device that a group can send from, the same kind on all its ranks."""
    if "cuda" in _device_types(group) and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@functools.lru_cache(maxsize=256)  # uploaded once, not in every step
def _index(rows: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=device)


def linear_index(p: Tensor) -> tuple[int, int, int]:
    """Where this rank's elements of a parameter lie in the whole, contiguous parameter.

    Element i of the contiguous local part, in memory order, is element
    `i // inner_local * inner_global + offset + i % inner_local` of the parameter.

    Args:
        p: a tensor of any shape; a DTensor may be sharded in its first dimension of more than one
            element, in one other dimension, or in both.

    Returns:
        (offset, inner_local, inner_global); (0, numel, numel) for a plain tensor. inner_local is
        at least 1, that it may be divided by where the local part is empty.

    Raises:
        NotImplementedError: the part of some rank has no such form; on all ranks then.
    """
    if not is_dtensor(p):
        return 0, max(p.numel(), 1), p.numel()
    sharded: Any = p
    return _linear_index(
        _Division(sharded.device_mesh, sharded.placements, tuple(p.shape)), tuple(local(p).shape)
    )


def holds_whole_blocks(p: Tensor) -> bool:
    """Whether the rows of p, of two dimensions at least, can be cut into blocks on one rank each.

    Rows of dimension 0, dense in memory one after the other and of a block at least; of a DTensor
    that is sharded in dimension 0, or in dimension 1 in equal pieces of whole blocks. Depends on
    what all ranks know alone.
    """
    return _holds_whole_blocks(p.shape, p.stride(), division(p))


@functools.lru_cache(maxsize=65536)  # asked for in every step
def _holds_whole_blocks(
    shape: torch.Size, stride: tuple[int, ...], division: tuple[Any, Any] | None
) -> bool:
    if math.prod(shape[1:]) < BLOCK or not rows_are_dense(shape, stride):
        return False
    if division is None:
        return True
    mesh, placements = division
    pieces = 1
    for dim, placement in enumerate(placements):
        if placement.is_replicate() or mesh.size(dim) == 1:
            continue
        if placement.is_partial() or placement.dim > 1:
            return False
        if placement.dim == 1:
            pieces *= mesh.size(dim)
    if pieces == 1:
        return True
    # of another layout, a piece of dimension 1 is no range of a row's memory
    inner = math.prod(shape[2:])
    is_contiguous = stride[1] == inner and rows_are_dense(shape[1:], stride[1:])
    return is_contiguous and shape[1] % pieces == 0 and shape[1] // pieces * inner % BLOCK == 0


def zeros_per_block(p: Tensor) -> Tensor:
    """int32 zeros [size(0), blocks of a row], divided over ranks as p is."""
    part = local(p)
    zeros = part.new_zeros(part.shape[0], num_blocks(part.shape[1:].numel()), dtype=torch.int32)
    if not is_dtensor(p):
        return zeros
    cls, sharded = _dtensor(), p
    assert cls is not None
    blocks = num_blocks(p.shape[1:].numel())
    whole: Tensor = cls.from_local(
        zeros,
        sharded.device_mesh,  # type: ignore[attr-defined]
        sharded.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=torch.Size((p.shape[0], blocks)),
        stride=(blocks, 1),
    )
    return whole


class _Division(NamedTuple):
    """Of a DTensor, all that says which of its elements a rank holds."""

    device_mesh: Any
    placements: tuple[Any, ...]
    shape: tuple[int, ...]


@functools.lru_cache(maxsize=65536)  # asked for in every step
def _linear_index(division: _Division, part: tuple[int, ...]) -> tuple[int, int, int]:
    shape = division.shape
    divided = _numberable_dims(division)
    if 0 in part:
        return 0, 1, math.prod(shape)
    begins = [_begin_here(division, dim, size) for dim, size in enumerate(part)]
    inner = divided[-1] if divided else 0
    offset = sum(begin * math.prod(shape[dim + 1 :]) for dim, begin in enumerate(begins))
    return offset, max(math.prod(part[inner:]), 1), math.prod(shape[inner:])


@functools.lru_cache(maxsize=65536)
def _numberable_dims(division: _Division) -> list[int]:
    """The dimensions that a DTensor is divided in.

    From its placements alone: all ranks refuse it or none, as one that goes on alone would wait for
    the others in a collective.

    Raises:
        NotImplementedError: the part of some rank has not the form of `linear_index`.
    """
    mesh, shape = division.device_mesh, division.shape
    divided = []
    for dim, size in enumerate(shape):
        cut = [
            k
            for k, placement in enumerate(division.placements)
            if not placement.is_replicate() and placement.dim == dim and mesh.size(k) > 1
        ]
        if not cut or size < 2:
            continue
        if all(_split_factor(division.placements[k]) == 1 for k in cut):
            divided.append(dim)
            continue
        counts = set()
        for coordinate in itertools.product(*(range(mesh.size(k)) for k in cut)):
            ranges = _ranges(division, dim, dict(zip(cut, coordinate, strict=True)))
            if any(a[1] != b[0] for a, b in itertools.pairwise(ranges)):
                _refuse_index(division, f"has the pieces {ranges} of dimension {dim} on one rank")
            counts.add(sum(end - begin for begin, end in ranges))
        if counts - {0, size}:
            divided.append(dim)
    leading = next((dim for dim, size in enumerate(shape) if size > 1), 0)
    if any(dim not in (leading, divided[-1]) for dim in divided):
        _refuse_index(division, f"is sharded in dimensions {divided}")
    return divided


def _split_factor(placement: Any) -> int:
    """Above 1 in a _StridedShard: a later mesh dimension has cut the dimension first."""
    return getattr(placement, "split_factor", 1)


def _begin_here(division: _Division, dim: int, size: int) -> int:
    """Where this rank's part of a dimension begins; `size` is what it has there."""
    coordinate = division.device_mesh.get_coordinate() or ()
    ranges = _ranges(division, dim, dict(enumerate(coordinate)))
    if sum(end - begin for begin, end in ranges) != size:
        _refuse_index(
            division, f"has {size} of dimension {dim} here, which its placement does not tell"
        )
    return ranges[0][0] if ranges else 0


def _ranges(division: _Division, dim: int, coordinate: dict[int, int]) -> list[tuple[int, int]]:
    """[begin, end) of a dimension's pieces on the rank with these coordinates, by mesh dimension.

    A mesh dimension without one is taken as one that does not divide.
    """
    ranges = [(0, division.shape[dim])]
    for mesh_dim, placement in enumerate(division.placements):
        if placement.is_replicate() or placement.dim != dim or mesh_dim not in coordinate:
            continue
        split = _split_factor(placement)
        pieces = [_chunk(ranges, split, k) for k in range(split)]
        rank, ranks = coordinate[mesh_dim], division.device_mesh.size(mesh_dim)
        ranges = [found for piece in pieces for found in _chunk(piece, ranks, rank)]
    return [(begin, end) for begin, end in ranges if begin < end]


def _chunk(ranges: Sequence[tuple[int, int]], chunks: int, k: int) -> list[tuple[int, int]]:
    """Chunk k of ranges laid end to end, as torch.chunk cuts them."""
    total = sum(end - begin for begin, end in ranges)
    size = -(-total // chunks)
    first, last = min(k * size, total), min((k + 1) * size, total)
    found, start = [], 0
    for begin, end in ranges:
        found.append((begin + max(first - start, 0), min(end, begin + last - start)))
        start += end - begin
    return [(begin, end) for begin, end in found if begin < end]


def _refuse_index(division: _Division, reason: str) -> NoReturn:
    raise NotImplementedError(
        f"a parameter of shape {division.shape}, a DTensor of placement {division.placements} on "
        f"{division.device_mesh}, {reason}; its elements cannot be numbered independently of the "
        f"sharding"
    )
