"""Which torch and GPU the extension accepts, what happens without it, and what its build says."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from maxva_kernels import _extension

# the package's function of the same name hides the module
backends = importlib.import_module("maxva_kernels.backends")
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("built_for", "built_with_cuda", "torch_version", "torch_cuda", "reason"),
    [
        ("2.12.1+cu130", "13.0", "2.12.0", "13.0", None),
        ("2.12.1", "13.0", "2.12.1", "13.1", None),
        ("2.12.1+cpu", None, "2.12.1+cpu", None, None),
        ("2.12.1+cpu", None, "2.12.1+cu130", "13.0", None),
        ("2.12.1", "13.0", "2.13.0", "13.0", "was built for torch 2.12.1, this is torch 2.13.0"),
        ("2.12.1", "13.0", "2.12.1+cpu", None, "has no CUDA"),
        ("2.12.1", "13.0", "2.12.1+cu126", "12.6", "with CUDA 12.6"),
    ],
)
def test_wrong_torch_is_refused_in_words(
    monkeypatch: pytest.MonkeyPatch,
    built_for: str,
    built_with_cuda: str | None,
    torch_version: str,
    torch_cuda: str | None,
    reason: str | None,
) -> None:
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    found = _extension._wrong_torch(built_for, built_with_cuda)
    assert (found is None) == (reason is None)
    assert found is None or (reason is not None and reason in found)


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("8.0;9.0", (8, 0), True),
        ("8.0;9.0", (8, 9), True),
        ("8.0;9.0", (7, 5), False),
        ("8.0;9.0", (10, 0), False),
        ("8.6", (8, 0), False),
        ("9.0+PTX", (12, 0), True),
        ("9.0+PTX", (8, 0), False),
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("10.0f", (10, 3), True),
        ("8.0 12.0+PTX", (12, 1), True),
        ("Hopper", (7, 0), True),  # torch's names are not looked up
    ],
)
def test_which_gpus_run_what_was_compiled(
    archs: str, capability: tuple[int, int], runs: bool
) -> None:
    assert _extension._runs_on(archs, capability) == runs


def test_gpu_that_was_not_compiled_for_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = [(7, 0)]
    monkeypatch.setattr(_extension, "_reason", None)
    monkeypatch.setattr(_extension, "WITH_CUDA", True)
    monkeypatch.setattr(_extension, "_archs", "7.5;8.0+PTX")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    initialized = [False]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized[0])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: "Volta")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: capability[gpu])
    _extension._why_not_on.cache_clear()
    assert backends.backends()["cuda"] == "available"  # nothing that asks may initialize CUDA
    initialized[0] = True
    message = 'Volta has 7.0; build it anew: MAXVA_CUDA_ARCHS="7.0"'
    assert message in backends.backends()["cuda"]
    with pytest.raises(RuntimeError, match=r"'cuda' is not available.*capability 7.5;8.0"):
        backends.check_name("cuda")
    capability[0] = (9, 0)
    _extension._why_not_on.cache_clear()
    backends.check_name("cuda")
    _extension._why_not_on.cache_clear()


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_missing_kernels_warn_once_and_fall_back(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    for name in backends.BACKENDS:
        if name != "eager":
            row = dataclasses.replace(backends.BACKENDS[name], why_not=lambda: "built without it")
            monkeypatch.setitem(backends.BACKENDS, name, row)
    backends._warn_of_fallback.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"'eager' backend.*built without it"):
        found = backends.find_backend("auto", device)
    assert type(found).__name__ == "EagerBackend"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.find_backend("auto", device) is found
    backends._warn_of_fallback.cache_clear()


# --- setup.py ------------------------------------------------------------------------------------


def run_setup(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True,
    )  # fmt: skip


def test_version_names_the_torch_it_is_built_for_and_nothing_is_written() -> None:
    info = ROOT / "maxva_kernels" / "_build_info.py"
    before = info.stat().st_mtime_ns
    run = run_setup("--version", MAXVA_BUILD_CUDA="0")
    major, minor = torch.__version__.split(".")[:2]
    assert run.stdout.splitlines()[-1] == f"0.1.0+torch{major}.{minor}.cpu"
    assert info.stat().st_mtime_ns == before
    run = run_setup("--version", MAXVA_NO_EXTENSION="1")
    assert run.stdout.splitlines()[-1] == "0.1.0"


@pytest.mark.parametrize("variable", ["MAXVA_NO_EXTENSION", "MAXVA_BUILD_CUDA"])
def test_switch_that_is_none_is_refused(variable: str) -> None:
    run = run_setup("--version", **{variable: "true"})
    assert run.returncode != 0
    assert f"{variable} must be 0, 1 or unset, is 'true'" in run.stderr


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("raise ImportError('none here')", "none here.*--no-build-isolation.*MAXVA_NO_EXTENSION=1"),
        ("__version__ = '2.10.1+cpu'", "torch >= 2.11 is needed, 2.10.1"),
    ],
)
def test_build_without_a_fitting_torch_says_what_to_do(
    module: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text(module)
    run = run_setup("--version", PYTHONPATH=str(tmp_path))
    assert run.returncode != 0
    assert re.search(message, run.stderr, re.DOTALL)
    assert "Traceback" not in run.stderr


def test_build_without_a_compiler_says_what_to_do(tmp_path: Path) -> None:
    folders = "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")
    run = run_setup("build_ext", *folders, CXX="/nowhere/c++", MAXVA_BUILD_CUDA="0")
    assert run.returncode != 0
    assert "no C++ compiler '/nowhere/c++'" in run.stderr
    assert "MAXVA_NO_EXTENSION=1" in run.stderr
    assert not list(tmp_path.rglob("_build_info.py"))
