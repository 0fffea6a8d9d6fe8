"""The operators: check, find the table, launch. Nothing here waits for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils.weak import WeakTensorKeyDictionary

from maxva_kernels.layouts import is_dense, is_fake

from . import multi_tensor_apply as mta
from . import norm, packed_update
from .checks import (
    DTYPES,
    LayoutFitter,
    TensorLists,
    check_arguments,
    check_control,
    check_gradients,
    check_one_element,
    check_tensors,
    check_written,
    needs_fitting,
)
from .maxva_math import LAMADAM, MADAM
from .statistics import range_of_phase
from .step_scalars import NUM_SCALARS, PARAMETERS, STATES
from .tables import (
    MAX_NORM_TABLES,
    MAX_UPDATE_TABLES,
    Combination,
    NormTable,
    Tables,
    UpdateTable,
    addresses,
    double_words,
    gradient_signature,
    is_capturing,
    signature,
)

#: Whether Triton interprets (TRITON_INTERPRET=1): then CPU tensors are served, and no others.
INTERPRETED = not isinstance(mta.update_kernel, triton.runtime.JITFunction)

_TL_DTYPES = dict(zip(DTYPES, (tl.float32, tl.float64, tl.bfloat16, tl.float16), strict=True))
_WORDS = {torch.int32: tl.int32, torch.int64: tl.int64}
_ALGORITHMS = {"madam": MADAM.value, "lamadam": LAMADAM.value}
# see Note [Rounding] in maxva_math.py
_UPDATE_OPTIONS: dict[str, Any] = {"num_warps": mta.NUM_WARPS, "enable_fp_fusion": False}
if torch.version.hip is None:
    # ptxas by itself stops at 128 for some variants and spills a few bytes
    _UPDATE_OPTIONS["maxnreg"] = 160
# with these a multiprocessor has five programs, for which loops with masks spill a few words or
# none
_PACKED_REGISTERS = 96
_NORM_OPTIONS = {"num_warps": norm.NUM_WARPS, "enable_fp_fusion": False}

# owned by the first parameter's counter, which lives as long as the optimizer's state
_update_tables: Any = WeakTensorKeyDictionary()
_norm_tables: dict[torch.device, Tables[NormTable]] = {}


def _on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()


def update_(
    theta: Sequence[Tensor],
    g: Sequence[Tensor],
    m: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    w: Sequence[Tensor],
    vmax: Sequence[Tensor],
    master: Sequence[Tensor],
    step: Sequence[Tensor],
    group_step: Sequence[Tensor],
    group_sizes: Sequence[int],
    hyper: Sequence[float],
    lr: Sequence[Tensor | None],
    control: Tensor | None,
    grad_scale: Tensor | None,
    norms: Tensor | None,
    statistics: Tensor | None,
    rounding: Sequence[int],
    algorithm: str,
    phase: int,
    check_only: bool = False,
) -> None:
    """One step: moves states and parameters and counts, unless control says skip.

    Args:
        theta: float32, float64, bfloat16 or float16 parameters of any shapes, on one device.
        g: gradients, of any of these dtypes.
        m: first state, float64 for float64 parameters, else float32; and so the others.
        u: weighted sums of gradients.
        v: weighted sums of squares.
        w: sums of weights.
        vmax: maxima of v/w, or empty.
        master: float32 copies that are moved instead of theta and rounded into it, or empty; of no
            float64 parameters.
        step: float32 counters of one element.
        group_step: int32 counters of one element, of groups that this call is to count.
        group_sizes: how many consecutive parameters each group has.
        hyper: lr and the rows of `Hyper` (step_scalars.py), flat.
        lr: per group a one-element tensor that overrides hyper's, or None.
        control: float64 [3] as write_control_ fills it, or None.
        grad_scale: one element, g is divided by it and written back; or None.
        norms: float64 [n, 2], sums of squares of theta and update: written in phase 1, read in 2.
        statistics: float64 [n, 5], the sums of `Statistics` (statistics.py), of which those that
            the phase knows are set; or None.
        rounding: rows of `Rounding` (stochastic_rounding.py), flat; empty to round to the nearest.
        algorithm: "madam" or "lamadam".
        phase: 0, everything; 1, states and norms; 2, parameters.
        check_only: everything is checked and nothing done.

    Raises:
        ValueError or TypeError: an argument does not fit. Nothing has been changed then.
    """
    states = {"m": m, "u": u, "v": v, "w": w, "vmax": vmax, "master": master}
    lists = TensorLists(theta, g, states, step, group_step, group_sizes, rounding)
    _update(lists, hyper, lr, control, grad_scale, norms, statistics, algorithm, phase, check_only)


def update_packed_(
    theta: Sequence[Tensor],
    g: Sequence[Tensor],
    packed: Sequence[Tensor],
    scale: Sequence[Tensor],
    maximum: Sequence[Tensor],
    master: Sequence[Tensor],
    step: Sequence[Tensor],
    group_step: Sequence[Tensor],
    group_sizes: Sequence[int],
    hyper: Sequence[float],
    lr: Sequence[Tensor | None],
    control: Tensor | None,
    grad_scale: Tensor | None,
    norms: Tensor | None,
    statistics: Tensor | None,
    rounding: Sequence[int],
    algorithm: str,
    phase: int,
    check_only: bool = False,
) -> None:
    """One step of parameters with compact states: those of compact.py instead of m, u, v, w.

    Args:
        theta: float32, bfloat16 or float16 parameters, dense with dimension 0 outermost.
        g: as update_'s.
        packed: a word per element in its parameter's layout, all int32 or all int64.
        scale: int32 [size(0), blocks per row], a word per block, for int32 words; else empty.
        maximum: in their parameter's layout codes of vmax's root (uint8) or, with int64 words, vmax
            in bfloat16; or empty.
        master: as update_'s, and so the next ones.
        step: float32 counters.
        group_step: int32 counters, or empty.
        group_sizes: how many consecutive parameters each group has.
        hyper: rows, flat.
        lr: per group a tensor or None.
        control: or None.
        grad_scale: or None.
        norms: float64 [n, 2].
        statistics: or None.
        rounding: rows of `Rounding`, all of which have random bits.
        algorithm: "madam" or "lamadam".
        phase: 0, everything; 1, norms, and no state is changed; 2, everything, with the norms.
        check_only: everything is checked and nothing done.

    Raises:
        ValueError or TypeError: an argument does not fit. Nothing has been changed then.
    """
    states = {"packed": packed, "scale": scale, "maximum": maximum, "master": master}
    lists = TensorLists(theta, g, states, step, group_step, group_sizes, rounding)
    _update(lists, hyper, lr, control, grad_scale, norms, statistics, algorithm, phase, check_only)


def _update(
    lists: TensorLists,
    hyper: Sequence[float],
    lr: Sequence[Tensor | None],
    control: Tensor | None,
    grad_scale: Tensor | None,
    norms: Tensor | None,
    statistics: Tensor | None,
    algorithm: str,
    phase: int,
    check_only: bool,
) -> None:
    if not lists.theta:
        return
    if algorithm not in _ALGORITHMS:
        raise ValueError(f"maxva: algorithm must be 'madam' or 'lamadam', is {algorithm!r}")
    if is_fake(lists.theta[0]):
        check_arguments(lists, hyper, lr, control, grad_scale, norms, statistics, phase)
        check_tensors(lists)
        return
    # the look for a table, too, asks whether this device's current stream is being captured
    with _on_device(lists.theta[0].device):
        check_arguments(lists, hyper, lr, control, grad_scale, norms, statistics, phase)
        table = _find_update_table(lists)
        if table.needs_fitting:
            check_written(lists, grad_scale is not None)
        if check_only:
            return
        given, fitter = lists, None
        if table.needs_fitting:
            fitter = LayoutFitter(lists, grad_scale is not None)
            lists = fitter.lists
            table = _find_update_table(lists)
        _launch_update(
            table, lists, hyper, lr, control, grad_scale, norms, statistics,
            _ALGORITHMS[algorithm], phase,
        )  # fmt: skip
        if fitter is not None:
            fitter.copy_back()
    # states are left out: autograd never sees them, and the time is a tenth of the step's
    increment_version(given.theta)
    if grad_scale is not None:
        increment_version(given.g)


def _find_update_table(lists: TensorLists) -> UpdateTable:
    def build() -> UpdateTable:
        check_tensors(lists)
        return UpdateTable(lists, needs_fitting(lists))

    try:
        found = signature(lists)
    except RuntimeError:
        check_tensors(lists)  # a tensor without address or strides: say which
        raise
    owner = lists.step[0]
    if owner not in _update_tables:
        _update_tables[owner] = Tables(MAX_UPDATE_TABLES)
    return _update_tables[owner].find(found, lists.theta[0].device, build)


def _step_words(
    lists: TensorLists, hyper: Sequence[float], lr: Sequence[Tensor | None]
) -> tuple[list[int], list[Tensor]]:
    """Addresses of gradients, kinds and words of lr, hyper; and tensors that must outlive them."""
    kinds, words, kept = [], [], []
    for tensor in lr:
        if tensor is None:
            kinds.append(mta.LR_ON_HOST.value)
            words.append(0)
            continue
        if tensor.dtype not in (torch.float32, torch.float64):
            tensor = tensor.double()
        kept.append(tensor)
        single = tensor.dtype == torch.float32
        kinds.append(mta.LR_FLOAT32.value if single else mta.LR_FLOAT64.value)
        words.append(tensor.data_ptr())
    return addresses(lists.g) + kinds + words + double_words(hyper), kept


def _launch_update(
    table: UpdateTable,
    lists: TensorLists,
    hyper: Sequence[float],
    lr: Sequence[Tensor | None],
    control: Tensor | None,
    grad_scale: Tensor | None,
    norms: Tensor | None,
    statistics: Tensor | None,
    algorithm: int,
    phase: int,
) -> None:
    n, groups = len(lists.theta), len(lr)
    capturing = is_capturing(table.device)
    stream = table.use_on_current_stream(capturing)
    words, kept = _step_words(lists, hyper, lr)
    on_device = table.step_words.on_device(words, stream, capturing)
    g_addresses, lr_kinds, lr_words, hyper_words = on_device.split([n, groups, groups, len(hyper)])
    for c in table.combinations:
        scalars = torch.empty(
            c.num_tensors,
            NUM_SCALARS.value,
            dtype=torch.float64 if c.theta_dtype == torch.float64 else torch.float32,
            device=table.device,
        )
        mta.make_scalars_kernel[(triton.cdiv(c.num_tensors, mta.LANES.value),)](
            c.rows, hyper_words, lr_kinds, lr_words, control,
            norms if phase == PARAMETERS.value else None, scalars, c.num_tensors,
            UNIT_RANGE=lists.is_packed, **_UPDATE_OPTIONS,
        )  # fmt: skip
        _launch_chunks(table, c, g_addresses, scalars, control, grad_scale, norms, statistics,
                       lists, algorithm, phase)  # fmt: skip
    if phase != STATES.value:
        counted = max(n, len(lists.group_step))
        mta.count_kernel[(triton.cdiv(counted, mta.LANES.value),)](
            table.steps, table.group_steps, control, n, len(lists.group_step), **_UPDATE_OPTIONS
        )
    del kept


def _packed_options(amsgrad: bool, collect: bool) -> dict[str, Any]:
    if amsgrad or collect or "maxnreg" not in _UPDATE_OPTIONS:
        return _UPDATE_OPTIONS
    return {**_UPDATE_OPTIONS, "maxnreg": _PACKED_REGISTERS}


def _launch_chunks(
    table: UpdateTable,
    c: Combination,
    g_addresses: Tensor,
    scalars: Tensor,
    control: Tensor | None,
    grad_scale: Tensor | None,
    norms: Tensor | None,
    statistics: Tensor | None,
    lists: TensorLists,
    algorithm: int,
    phase: int,
) -> None:
    squares = _chunk_sums(c, norms if phase == STATES.value else None)
    statistics_of_chunk = _chunk_sums(c, statistics)
    if c.num_chunks:
        arguments = (
            c.rows, g_addresses, c.chunk_tensor, scalars, control, grad_scale, squares,
            statistics_of_chunk,
        )  # fmt: skip
        options: dict[str, Any] = {
            "THETA_DTYPE": _TL_DTYPES[c.theta_dtype],
            "G_DTYPE": _TL_DTYPES[c.g_dtype],
            "ALGORITHM": algorithm,
            "HAS_MASTER": bool(lists.states["master"]),
            "PHASE": phase,
        }
        if lists.is_packed:
            amsgrad = bool(lists.states["maximum"])
            packed_update.update_packed_kernel[(c.num_chunks,)](
                *arguments, c.rounding,
                WORD=_WORDS[lists.states["packed"][0].dtype],
                AMSGRAD=amsgrad,
                ROUND_THETA=c.is_stochastic,
                **options,
                **_packed_options(amsgrad, statistics is not None),
            )  # fmt: skip
        else:
            mta.update_kernel[(c.num_chunks,)](
                *arguments, c.rounding if phase != STATES.value else None,
                T=_TL_DTYPES[scalars.dtype],
                AMSGRAD=bool(lists.states["vmax"]),
                **options,
                **_UPDATE_OPTIONS,
            )  # fmt: skip
    _add_sums(c, squares, control, norms, range(2))
    _add_sums(c, statistics_of_chunk, control, statistics, range_of_phase(phase))


def _chunk_sums(c: Combination, of_tensor: Tensor | None) -> Tensor | None:
    """Room for what is to be added to a table of one row per tensor."""
    return None if of_tensor is None else of_tensor.new_empty(c.num_chunks, of_tensor.shape[1])


def _add_sums(
    c: Combination,
    of_chunk: Tensor | None,
    control: Tensor | None,
    of_tensor: Tensor | None,
    fields: range,
) -> None:
    if of_chunk is not None:
        mta.add_sums_kernel[(c.num_tensors, len(fields))](
            c.rows, of_chunk, control, of_tensor,
            FIRST_FIELD=fields.start, WIDTH=of_chunk.shape[1], **_UPDATE_OPTIONS,
        )  # fmt: skip


def sum_of_squares(g: Sequence[Tensor]) -> Tensor:
    """The sum of squares of all elements of tensors on one device.

    Args:
        g: float32, float64, bfloat16 or float16 tensors, at least one.

    Returns:
        float64 [1] on their device; inf or NaN where an element is. The same bits in every run.
    """
    if not g:
        raise ValueError("maxva: sum_of_squares needs at least one tensor")
    device = g[0].device
    if is_fake(g[0]):
        check_gradients(g)
        return g[0].new_empty(1, dtype=torch.float64)
    found = gradient_signature(g)
    if found is None:
        check_gradients(g)
        g = [x if is_dense(x.shape, x.stride()) else x.contiguous() for x in g]
        found = [tensor.numel() for tensor in g], [tensor.dtype for tensor in g]
    numels, dtypes = found
    tables = _norm_tables.setdefault(device, Tables(MAX_NORM_TABLES))
    with _on_device(device):
        table = tables.find([numels, dtypes], device, lambda: NormTable(device, numels, dtypes))
        capturing = is_capturing(device)
        stream = table.use_on_current_stream(capturing)
        g_addresses = table.step_words.on_device(addresses(g), stream, capturing)
        num_chunks = sum(c.num_chunks for c in table.combinations)
        partial = torch.empty(num_chunks, dtype=torch.float64, device=device)
        result = torch.empty(1, dtype=torch.float64, device=device)
        done = 0
        for c in table.combinations:
            if c.num_chunks:
                norm.sum_of_squares_kernel[(c.num_chunks,)](
                    c.rows, g_addresses, c.chunk_tensor, partial[done:],
                    G_DTYPE=_TL_DTYPES[c.g_dtype], **_NORM_OPTIONS,
                )  # fmt: skip
            done += c.num_chunks
        norm.add_partial_sums_kernel[(1,)](partial, result, num_chunks, **_NORM_OPTIONS)
    return result


def write_control_(
    control: Tensor,
    sum_of_squares: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    max_grad_norm: float,
    skip_nonfinite: bool,
) -> None:
    """Fills the control block {skip, clip factor, gradient norm}.

    Args:
        control: float64 [3], written.
        sum_of_squares: float64, one element, of the gradients as they are (scaled).
        grad_scale: one element, what the gradients have been multiplied by; or None.
        found_inf: one element, not 0 to skip; or None.
        max_grad_norm: infinity for no clipping.
        skip_nonfinite: skip where the norm is not a finite float32.
    """
    device = control.device
    check_control(control, device)
    check_one_element(sum_of_squares, "sum_of_squares", torch.float64, device)
    check_one_element(grad_scale, "grad_scale", None, device)
    check_one_element(found_inf, "found_inf", None, device)
    if is_fake(control):
        return
    with _on_device(device):
        norm.write_control_kernel[(1,)](
            control, sum_of_squares, grad_scale, found_inf, double_words([max_grad_norm])[0],
            SKIP_NONFINITE=bool(skip_nonfinite), **_NORM_OPTIONS,
        )  # fmt: skip
