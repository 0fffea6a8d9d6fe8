"""What the Triton kernels compile to, without a GPU: width of accesses, rounding, spills."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from maxva_kernels.backends import _no_triton_kernels

if reason := _no_triton_kernels():
    pytest.skip(reason, allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreted kernel is not compiled", allow_module_level=True)

import triton
import triton.language as tl
from maxva_kernels.triton_kernels import multi_tensor_apply as mta
from maxva_kernels.triton_kernels import norm, operators, packed_update, stochastic_rounding
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {tl.float32: "*fp32", tl.float64: "*fp64", tl.bfloat16: "*bf16", tl.float16: "*fp16"}
#: Bits that one access of the main path moves at least, per kind of element.
WIDE = r"\.(v4\.b32|v8\.b32|v2\.b64|v4\.b64|b128)"
#: The same where blocks are half as large, see Note [Chunk and block]: four bfloat16 at a time.
HALF_BLOCK_WIDE = WIDE.replace(")", r"|v2\.b32)")
VARIANTS: dict[str, dict[str, Any]] = {
    "madam": {},
    "lamadam_amsgrad": {"algorithm": 1, "amsgrad": True},
    "grad_scale": {"scale": True},
    "bf16": {"theta": tl.bfloat16, "g": tl.bfloat16},
    "fp16_master": {"theta": tl.float16, "g": tl.float16, "master": True},
    "fp64": {"theta": tl.float64, "g": tl.float64},
    "fp64_amsgrad_scale": {"theta": tl.float64, "g": tl.float64, "amsgrad": True, "scale": True},
    "states": {"phase": 1},
    "parameters": {"phase": 2},
    "stochastic_amsgrad_scale_statistics": {
        "theta": tl.bfloat16, "g": tl.bfloat16, "rounding": True, "statistics": True,
        "algorithm": 1, "amsgrad": True, "scale": True,
    },
}  # fmt: skip
#: Compiled for one GPU alone.
MORE_VARIANTS: dict[str, dict[str, Any]] = {
    "stochastic": {"theta": tl.bfloat16, "g": tl.bfloat16, "rounding": True},
    "statistics": {"statistics": True},
    "statistics_states": {"phase": 1, "statistics": True},
    "stochastic_parameters_statistics": {
        "theta": tl.bfloat16,
        "phase": 2,
        "rounding": True,
        "statistics": True,
    },
    "fp64_amsgrad_scale_statistics": {
        "theta": tl.float64,
        "g": tl.float64,
        "amsgrad": True,
        "scale": True,
        "statistics": True,
    },
}


@pytest.fixture(scope="session", autouse=True)
def fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Compiles what is here now."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton_cache")))
        yield


def compiled(kernel: Any, capability: int, pointers: dict[str, str | None],
             constants: dict[str, Any], options: Any = None, **scalars: str) -> Any:  # fmt: skip
    """The kernel for one GPU; a pointer of type None is an argument that is None."""
    signature = {
        name: pointers[name] or "constexpr" if name in pointers else scalars.get(name, "constexpr")
        for name in kernel.arg_names
    }
    values = {**constants, **{name: None for name, kind in pointers.items() if kind is None}}
    return triton.compile(
        ASTSource(kernel, signature, values),
        target=GPUTarget("cuda", capability, 32),
        options=operators._UPDATE_OPTIONS if options is None else options,
    )


def compiled_update(capability: int, theta: Any = tl.float32, g: Any = tl.float32,
                    algorithm: int = 0, amsgrad: bool = False, master: bool = False,
                    scale: bool = False, phase: int = 0, statistics: bool = False,
                    rounding: bool = False) -> Any:  # fmt: skip
    compute = tl.float64 if theta == tl.float64 else tl.float32
    return compiled(
        mta.update_kernel,
        capability,
        {
            "rows": "*i64", "g_addresses": "*i64", "chunk_tensor": "*i32",
            "scalars": POINTERS[compute], "control": "*fp64",
            "grad_scale": "*fp32" if scale else None, "sums": "*fp64" if phase == 1 else None,
            "statistics": "*fp64" if statistics else None, "rounding": "*i64" if rounding else None,
        },
        {
            "THETA_DTYPE": theta, "G_DTYPE": g, "T": compute, "ALGORITHM": algorithm,
            "AMSGRAD": amsgrad, "HAS_MASTER": master, "PHASE": phase,
        },
    )  # fmt: skip


def compiled_packed_update(
    capability: int, word: Any = tl.int32, theta: Any = tl.float32, g: Any = tl.float32,
    algorithm: int = 0, amsgrad: bool = False, master: bool = False, scale: bool = False,
    phase: int = 0, statistics: bool = False, round_theta: bool = False,
) -> Any:  # fmt: skip
    return compiled(
        packed_update.update_packed_kernel,
        capability,
        {
            "rows": "*i64", "g_addresses": "*i64", "chunk_tensor": "*i32", "scalars": "*fp32",
            "control": "*fp64", "grad_scale": "*fp32" if scale else None,
            "sums": "*fp64" if phase == 1 else None, "statistics": "*fp64" if statistics else None,
            "rounding": "*i64",
        },
        {
            "THETA_DTYPE": theta, "G_DTYPE": g, "WORD": word, "ALGORITHM": algorithm,
            "AMSGRAD": amsgrad, "HAS_MASTER": master, "ROUND_THETA": round_theta, "PHASE": phase,
        },
        operators._packed_options(amsgrad, statistics),
    )  # fmt: skip


def inspected(kernel: Any, folder: Path, name: str, *options: str) -> str:
    """What one of the CUDA toolkit's programs prints about the compiled kernel."""
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    tool = str(bundled) if bundled.exists() else shutil.which(name)
    assert tool, f"no {name}, neither in Triton nor on the path"
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    return subprocess.run(
        [tool, *options, str(cubin)], capture_output=True, text=True, check=True
    ).stdout


def check_resources(kernel: Any, folder: Path, stack: int = 0) -> int:
    """No local memory, and no more stack: nothing is spilled. Returns the number of registers."""
    usage = inspected(kernel, folder, "cuobjdump", "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:0", usage)
    assert found, usage
    assert int(found[2]) <= stack, usage
    return int(found[1])


def loops(kernel: Any, folder: Path) -> list[list[str]]:
    """The instructions of every loop."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    found = []
    for line in inspected(kernel, folder, "nvdisasm", "-c").splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
            target = re.search(r"\bBRA\b.*?(\.L_x_\d+)", instruction[1])
            if target and target[1] in labels:
                found.append(instructions[labels[target[1]] :])
    return found


def check_rounding(ptx: str) -> None:
    assert not re.findall(r"\b(?:div\.full|div\.approx|sqrt\.approx|rsqrt|rcp)[\w.]*", ptx)
    assert ".ftz" not in ptx


@pytest.mark.parametrize(
    ("variant", "capability"),
    [
        *(
            pytest.param(variant, capability, id=f"{name}-sm_{capability}")
            for name, variant in VARIANTS.items()
            for capability in (80, 90, 100)
        ),
        *(pytest.param(variant, 90, id=f"{name}-sm_90") for name, variant in MORE_VARIANTS.items()),
    ],
)
def test_update(variant: dict[str, Any], capability: int, tmp_path: Path) -> None:
    kernel = compiled_update(capability, **variant)
    ptx = kernel.asm["ptx"]
    check_rounding(ptx)
    assert re.search(r"\bdiv\.rn\.", ptx)
    assert re.search(r"\bsqrt\.rn\.", ptx)
    phase = variant.get("phase", 0)
    states = 5 if variant.get("amsgrad") else 4
    # theta and the states; the parameters' phase does without u
    read = 1 + states - (phase == 2)
    written = {0: 1 + states, 1: states, 2: 1}[phase]
    wide = WIDE
    if variant.get("theta") == tl.bfloat16 and (variant.get("rounding") or "statistics" in variant):
        wide = HALF_BLOCK_WIDE
    # there are two main paths, and g is aligned in one of them
    assert len(re.findall(rf"ld\.global[\w.]*{wide}", ptx)) >= 2 * read + 1
    assert len(re.findall(rf"st\.global[\w.]*{wide}", ptx)) >= 2 * written
    check_resources(kernel, tmp_path)


def test_main_path_has_no_narrow_access() -> None:
    """Narrow accesses are those of the tail, of the misaligned gradient and of the tables."""
    ptx = compiled_update(90).asm["ptx"]
    narrow_stores = len(re.findall(r"st\.global\.b32", ptx))
    wide_stores = len(re.findall(r"st\.global\.v4\.b32", ptx))
    # 5 lists; 2 wide stores of 4 elements or 8 narrow ones per thread; 2 wide paths, 1 narrow
    assert (wide_stores, narrow_stores) == (2 * 5 * 2, 5 * 8)


#: By kind of packed update: what is compiled, for which GPUs, and wide loads and stores of the main
#: path (theta, g, packed; theta, packed), of which each moves four elements.
PACKED_VARIANTS: dict[str, tuple[dict[str, Any], tuple[int, ...], tuple[int, int]]] = {
    "int8": ({}, (80, 90, 100), (3, 2)),
    # four words are 32 bytes
    "bfloat16": ({"word": tl.int64}, (80, 90, 100), (4, 3)),
    "int8_states": ({"phase": 1}, (80,), (3, 0)),
    "int8_scale": ({"scale": True}, (90,), (3, 2)),
    "bfloat16_scale": ({"word": tl.int64, "scale": True}, (90,), (4, 3)),
    "int8_bf16": ({"theta": tl.bfloat16, "g": tl.bfloat16, "round_theta": True}, (90,), (3, 2)),
    "bfloat16_bf16": (
        {"word": tl.int64, "theta": tl.bfloat16, "g": tl.bfloat16, "round_theta": True},
        (90,),
        (4, 3),
    ),
    "int8_bf16_fp32_gradients": ({"theta": tl.bfloat16, "round_theta": True}, (90,), (3, 2)),
    "bfloat16_bf16_fp32_gradients": (
        {"word": tl.int64, "theta": tl.bfloat16, "round_theta": True},
        (90,),
        (4, 3),
    ),
    "int8_bf16_master": (
        {"theta": tl.bfloat16, "g": tl.bfloat16, "master": True},
        (90, 100),
        (3, 3),
    ),
    "bfloat16_bf16_master": (
        {"word": tl.int64, "theta": tl.bfloat16, "g": tl.bfloat16, "master": True},
        (90,),
        (4, 4),
    ),
    "int8_bf16_amsgrad_scale_statistics": (
        {
            "theta": tl.bfloat16, "g": tl.bfloat16, "round_theta": True, "statistics": True,
            "algorithm": 1, "amsgrad": True, "scale": True,
        },
        (90,),
        (3, 2),
    ),
    "bfloat16_fp16_master_amsgrad": (
        {
            "word": tl.int64, "theta": tl.float16, "g": tl.float16, "master": True,
            "amsgrad": True,
        },
        (100,),
        (5, 5),
    ),
}  # fmt: skip
#: Bytes of a multiprocessor, of which each program takes RESERVED beside its own.
SHARED_MEMORY = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
RESERVED = 1024
REGISTERS = 65536


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        pytest.param(name, capability, id=f"{name}-sm_{capability}")
        for name, (_, capabilities, _) in PACKED_VARIANTS.items()
        for capability in capabilities
    ],
)
def test_packed_update(name: str, capability: int, tmp_path: Path) -> None:
    """Notes [Tile] and [Stages]: four elements per access, five programs per multiprocessor.

    No division is exact. Loads are copies to shared memory, ahead of their use, which bounds no
    number of programs. A block's largest value takes one instruction, and random words a call for
    four elements. Registers spill in loops with masks alone.
    """
    variant, _, (loads, stores) = PACKED_VARIANTS[name]
    kernel = compiled_packed_update(capability, **variant)
    ptx = kernel.asm["ptx"]
    if not variant.get("scale"):
        assert not re.findall(r"\b(?:div|sqrt)\.(?:rn|full)\b", ptx)
    wide, copied = HALF_BLOCK_WIDE, "0x(?:8|10)"
    if variant.get("theta", tl.float32) == tl.float32:
        wide, copied = WIDE, "0x10"
    # two main paths, g is aligned in one of them; copied before the loop, and a tile in it
    stages = packed_update.FAVORABLE_STAGES.value, packed_update.FULL_STAGES.value
    copies = stages[0] * loads + stages[1] * (loads - 1)
    assert len(re.findall(rf"cp\.async\.c\w[^;]*, {copied}\b", ptx)) >= copies
    # and where rows or chunks end, a path of wide accesses without copies
    assert len(re.findall(rf"ld\.global[\w.]*{wide}", ptx)) >= loads
    assert len(re.findall(rf"st\.global[\w.]*{wide}", ptx)) >= 3 * stores
    is_int8 = variant.get("word") != tl.int64
    if is_int8 and variant.get("phase") != 1:
        assert len(re.findall(r"redux\.sync\.max", ptx)) == 4 * (4 if variant.get("amsgrad") else 3)
    registers = check_resources(kernel, tmp_path, stack=48)
    if not variant.get("amsgrad") and not variant.get("statistics"):
        assert registers <= 96
    programs = REGISTERS // (32 * mta.NUM_WARPS * registers)
    assert programs * (kernel.metadata.shared + RESERVED) <= SHARED_MEMORY[capability]
    # that divide: the end of a program branches to itself
    bodies = [body for body in map(" ".join, loops(kernel, tmp_path)) if "MUFU" in body]
    main = [body for body in bodies if "LDGSTS" in body]
    assert (len(main), len(bodies)) == (2, 4)
    assert not re.findall(r"\b(?:STL|LDL)\b", "".join(main))
    if variant.get("phase") != 1:
        wide_products = [len(re.findall(r"\bIMAD\.(?:WIDE|HI)\.U32\b", body)) for body in bodies]
        four_calls = 4 * 2 * stochastic_rounding.PHILOX_ROUNDS.value
        assert sum(count >= four_calls for count in wide_products) == 1
    print(f"{name} on sm_{capability}: {registers} registers")


@pytest.mark.parametrize("capability", [80, 90, 100], ids=lambda c: f"sm_{c}")
@pytest.mark.parametrize("g", POINTERS, ids=[str(g) for g in POINTERS])
def test_norm(g: Any, capability: int, tmp_path: Path) -> None:
    kernel = compiled(
        norm.sum_of_squares_kernel,
        capability,
        {"rows": "*i64", "g_addresses": "*i64", "chunk_tensor": "*i32", "partial": "*fp64"},
        {"G_DTYPE": g},
    )
    assert re.search(rf"ld\.global[\w.]*{WIDE}", kernel.asm["ptx"])
    check_resources(kernel, tmp_path)


@pytest.mark.parametrize("capability", [80, 90, 100], ids=lambda c: f"sm_{c}")
@pytest.mark.parametrize("scalars", ["*fp32", "*fp64"])
@pytest.mark.parametrize("given", [True, False], ids=["all_given", "none_given"])
def test_small_kernels(given: bool, scalars: str, capability: int, tmp_path: Path) -> None:
    def optional(kind: str) -> str | None:
        return kind if given else None

    kernels = [
        compiled(
            mta.make_scalars_kernel,
            capability,
            {"rows": "*i64", "hyper": "*i64", "lr_kinds": "*i64", "lr_words": "*i64",
             "control": optional("*fp64"), "norms": optional("*fp64"), "scalars": scalars},
            {"UNIT_RANGE": given and scalars == "*fp32"},
            num_tensors="i32",
        ),
        compiled(
            mta.count_kernel,
            capability,
            {"steps": "*i64", "group_steps": "*i64", "control": optional("*fp64")},
            {},
            num_steps="i32",
            num_group_steps="i32",
        ),
        compiled(
            mta.add_sums_kernel,
            capability,
            {"rows": "*i64", "of_chunk": "*fp64", "control": optional("*fp64"),
             "of_tensor": "*fp64"},
            {"FIRST_FIELD": 0, "WIDTH": 5},
        ),
        compiled(
            norm.add_partial_sums_kernel,
            capability,
            {"partial": "*fp64", "result": "*fp64"},
            {},
            num_partial="i32",
        ),
        compiled(
            norm.write_control_kernel,
            capability,
            {"control": "*fp64", "sum_of_squares": optional("*fp64"),
             "grad_scale": optional("*fp32"), "found_inf": optional("*fp32")},
            {"SKIP_NONFINITE": given},
            max_grad_norm_bits="i64",
        ),
    ]  # fmt: skip
    for kernel in kernels:
        assert not re.findall(r"\b(?:div\.full|div\.approx|sqrt\.approx)", kernel.asm["ptx"])
        check_resources(kernel, tmp_path)
