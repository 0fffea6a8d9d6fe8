"""The CUDA sources without a GPU: the kernels run on the host, registers, machine code."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
ARCH = "sm_90"
#: The kernel of most steps: FusedMAdam, no amsgrad, one pass, float32.
MAIN_KERNEL = "update_kernelILNS_9AlgorithmE0ELb0ELNS_5PhaseE0ELb0EfE"
#: The same with states in int8.
PACKED_KERNEL = "packed_kernelILNS_7PackingE0ELNS_9AlgorithmE0ELb0ELb0ELb0E"
SANITIZERS = "-fsanitize=address,alignment"
NVCC_FLAGS = ["-std=c++20", "-O3", "-fmad=false", f"-arch={ARCH}", "-Xptxas=-v"]
NVCC_FLAGS += ["-Werror=all-warnings"]
HOST_FLAGS = ["-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toolkit = _load(ROOT / "tools" / "cuda_toolkit.py")
CUDA_HOME = toolkit.find_cuda_home()
needs_nvcc = pytest.mark.skipif(CUDA_HOME is None, reason="no CUDA toolkit (nvcc) is installed")
needs_gcc = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def _run(command: list[object]) -> subprocess.CompletedProcess[str]:
    run = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert run.returncode == 0, f"{command}\n{run.stdout}\n{run.stderr}"
    return run


def _parallel(commands: list[list[object]]) -> list[subprocess.CompletedProcess[str]]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(_run, commands))


@needs_gcc
def test_kernels_on_the_host(tmp_path: Path) -> None:
    compiler = ["g++", *HOST_FLAGS, f"-I{ROOT / 'tests/cpp/on_host'}", f"-I{CSRC}", "-c"]
    checked = ["-O1", "-fno-strict-aliasing", "-fno-sanitize-recover=all", SANITIZERS]
    tests = sorted((ROOT / "tests/cpp").glob("test_*.cpp"))
    libraries = {
        **{
            CSRC / f"{name}.cpp": ["-O2", "-fopenmp-simd"]
            for name in ("cpu_kernels", "cpu_packed_kernels")
        },
        **{kernels: [*checked, "-x", "c++"] for kernels in sorted(CSRC.glob("*.cu"))},
    }
    sources = {**libraries, **dict.fromkeys(tests, checked)}
    objects = {source: tmp_path / f"{source.stem}.o" for source in sources}
    _parallel(
        [[*compiler, *flags, s, "-o", objects[s]] for s, flags in sources.items()],
    )
    assert len(tests) == 3
    for test in tests:
        program = tmp_path / test.stem
        used = [objects[source] for source in [*libraries, test]]
        _run(["g++", SANITIZERS, *used, "-o", program])
        run = _run([program])
        assert re.search(r"\d+ cases, 0 failures|skipped", run.stdout)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Source name -> object file and what ptxas said."""
    folder = tmp_path_factory.mktemp("cuda")
    sources = sorted(CSRC.glob("*.cu"))
    assert CUDA_HOME is not None
    compiler = [CUDA_HOME / "bin/nvcc", *NVCC_FLAGS, "-c"]
    runs = _parallel([[*compiler, s, "-o", folder / f"{s.stem}.o"] for s in sources])
    return {
        source.name: (folder / f"{source.stem}.o", run.stderr + run.stdout)
        for source, run in zip(sources, runs, strict=True)
    }


@needs_nvcc
def test_no_kernel_spills_registers(compiled: dict[str, tuple[Path, str]]) -> None:
    logs = "".join(log for _, log in compiled.values())
    # 2 algorithms x amsgrad or not x 3 phases x statistics or not x 2 precisions; 2 packings x 2
    # algorithms x amsgrad or not x (norms, with statistics, without); and the four small kernels
    assert logs.count("Compiling entry function") == 48 + 24 + 4
    _check_no_spills(logs)


def _check_no_spills(log: str) -> None:
    spills = set(re.findall(r"\d+ bytes spill stores, \d+ bytes spill loads", log))
    assert spills == {"0 bytes spill stores, 0 bytes spill loads"}


@needs_nvcc
def test_oldest_architecture_compiles_without_spills(tmp_path: Path) -> None:
    """It has code of its own: without redux, maxima of a warp are shuffled."""
    major, minor = min(toolkit.DEFAULT_ARCHS)
    flags = [flag.replace(ARCH, f"sm_{major}{minor}") for flag in NVCC_FLAGS]
    source = CSRC / "cuda_packed_int8.cu"
    run = _run([CUDA_HOME / "bin/nvcc", *flags, "-c", source, "-o", tmp_path / "int8.o"])
    log = run.stderr + run.stdout
    assert log.count("Compiling entry function") == 12
    _check_no_spills(log)


@needs_nvcc
def test_float_kernels_fit_three_blocks(compiled: dict[str, tuple[Path, str]]) -> None:
    """65,536 registers per multiprocessor: 64 a thread let 4 blocks of 256 reside, 80 let 3."""
    registers: dict[str, int] = {}
    for _, log in compiled.values():
        found = re.findall(r"entry function '(\w+)'.*?Used (\d+) registers", log, re.DOTALL)
        registers.update({name: int(count) for name, count in found})
    main = [count for name, count in registers.items() if MAIN_KERNEL in name]
    packed = [count for name, count in registers.items() if re.search("packed.*ELb0ELb0EEEv", name)]
    floats = [count for name, count in registers.items() if re.search(r"PhaseE\dELb\dEfE", name)]
    assert len(main) == 1
    assert len(floats) == 24
    assert main[0] <= 64
    assert max(floats) <= 80
    assert len(packed) == 8
    assert max(packed) <= 80


def _cuobjdump() -> Path | None:
    candidates = [CUDA_HOME / "bin/cuobjdump"] if CUDA_HOME else []
    if found := shutil.which("cuobjdump"):
        candidates.append(Path(found))
    if spec := importlib.util.find_spec("triton"):
        for folder in spec.submodule_search_locations or ():
            candidates.append(Path(folder) / "backends/nvidia/bin/cuobjdump")
    return next((path for path in candidates if path.is_file()), None)


def _instructions(obj: Path, kernel: str) -> list[str]:
    """Of one kernel, after the barrier that ends the prologue, in which one thread prepares."""
    sass = _run([_cuobjdump(), "-sass", obj]).stdout
    (text,) = (f for f in re.split(r"\n\s*Function : ", sass) if kernel in f.splitlines()[0])
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text)
    return names[names.index("BAR.SYNC.DEFER_BLOCKING") :]


needs_cuobjdump = pytest.mark.skipif(
    _cuobjdump() is None, reason="cuobjdump is in neither the toolkit nor Triton"
)


@needs_nvcc
@needs_cuobjdump
def test_main_path_moves_128_bits_at_a_time(compiled: dict[str, tuple[Path, str]]) -> None:
    body = _instructions(compiled["cuda_update_madam.cu"][0], MAIN_KERNEL)
    # m, v, w, u one after the other, with nothing between them that would wait for a load
    start = body.index("LDG.E.128")
    assert body[start : start + 8].count("LDG.E.128") == 4
    assert body.count("LDG.E.128") >= 6
    assert body.count("STG.E.128") >= 5
    # generic accesses mean that the compiler lost the address space, local ones that it spilled
    assert not [name for name in body if re.match(r"(LD|ST)\.E|LDL|STL", name)]


@needs_nvcc
@needs_cuobjdump
def test_packed_main_path_is_short(compiled: dict[str, tuple[Path, str]]) -> None:
    """4.8 TB/s at 20 bytes per element leave an H200 about 120 instructions each, and no waits."""
    body = _instructions(compiled["cuda_packed_int8.cu"][0], PACKED_KERNEL)
    assert not [name for name in body if re.match(r"(LD|ST)\.E|LDL|STL", name)]
    # the fast path is the last: words, theta and g are loaded together, words and theta stored
    wide = [i for i, name in enumerate(body) if name == "LDG.E.128"][-3:]
    between = body[wide[0] : wide[2]]
    # addresses and scalars: nothing that would wait for a load
    assert {name.split(".")[0] for name in between} <= {"LDG", "LDS", "IMAD"}
    assert len(between) <= 12
    # what is loaded here has been prefetched, the scales before the loop
    prefetches = [i for i, name in enumerate(body) if name == "CCTL.E.PF2"]
    assert len(prefetches) == 3
    stores = [i for i, name in enumerate(body) if name == "STG.E.128"]
    end = min(i for i in stores if i > wide[2])
    assert end + 1 in stores
    step = body[prefetches[0] : end]
    assert [name for name in step if name.startswith("LDG")] == 3 * ["LDG.E.128"]
    # per thread and four elements; what only happens where a number is not finite is counted, too
    path = body[wide[0] : end + 2]
    assert "BAR.SYNC.DEFER_BLOCKING" not in path
    assert path.count("REDUX.MAX") == 3
    assert len(path) <= 4 * 135


def test_architectures_as_torch_spells_them() -> None:
    assert toolkit.torch_arch_list("80;90;100;120+PTX") == "8.0;9.0;10.0;12.0+PTX"
    assert toolkit.torch_arch_list("9.0") == "9.0"
    assert toolkit.torch_arch_list("90a, 103") == "9.0a;10.3"
    with pytest.raises(ValueError, match="MAXVA_CUDA_ARCHS"):
        toolkit.torch_arch_list("hopper")


@pytest.mark.parametrize(
    ("known", "visible", "archs"),
    [
        ("50 70 75 80 90", [], "7.5;8.0;9.0+PTX"),  # CUDA 12.6
        ("75 80 90 100 110 103 120 121", [], "7.5;8.0;9.0;10.0;12.0+PTX"),
        ("50 70 75 80 86 90", [(7, 0), (8, 6)], "7.0;7.5;8.0;9.0+PTX"),
        ("75 80 90 100 110 120", [(7, 0), (11, 0)], "7.5;8.0;9.0;10.0;11.0;12.0+PTX"),
    ],
)
def test_default_architectures_are_what_the_toolkit_knows(
    tmp_path: Path, known: str, visible: list[tuple[int, int]], archs: str
) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\nprintf 'compute_%s\\n' {known}\n")
    nvcc.chmod(0o755)
    assert toolkit.default_archs(tmp_path, visible) == archs


def test_gpus_that_do_not_answer_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    def no_driver(gpu: int) -> tuple[int, int]:
        raise RuntimeError("the driver is too old")

    answers = SimpleNamespace(device_count=lambda: 2, get_device_capability=lambda gpu: (8, gpu))
    assert toolkit.visible_gpus(answers) == [(8, 0), (8, 1)]
    answers.get_device_capability = no_driver
    assert toolkit.visible_gpus(answers) == []
    assert "the driver is too old" in capsys.readouterr().out


@pytest.mark.parametrize("archs", ["", "90"])
def test_cuda_that_is_asked_for_and_not_there_fails_loudly(tmp_path: Path, archs: str) -> None:
    """Without a toolkit or with a CPU torch; where both are there, CUDA_HOME points nowhere."""
    environment = {
        **os.environ,
        "MAXVA_BUILD_CUDA": "1",
        "CUDA_HOME": str(tmp_path),
        "MAXVA_CUDA_ARCHS": archs,
    }
    run = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode != 0
    assert re.search("install (CUDA|a CUDA build of torch)", run.stderr), run.stderr
