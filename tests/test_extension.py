"""Which torch the extension accepts, and what happens on a GPU that it was not built for."""

from __future__ import annotations

import dataclasses
import importlib
import warnings

import pytest
import torch

from maxva_kernels import _extension

# the package's function of the same name hides the module
backends = importlib.import_module("maxva_kernels.backends")


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


def test_gpu_without_cuda_kernels_warns_once_and_falls_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    for name in backends.BACKENDS:
        if name not in ("eager", "cpu"):
            row = dataclasses.replace(backends.BACKENDS[name], why_not=lambda: "built without it")
            monkeypatch.setitem(backends.BACKENDS, name, row)
    backends._warn_without_cuda.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"'eager' backend.*built without it"):
        found = backends.find_backend("auto", "cuda")
    assert type(found).__name__ == "EagerBackend"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.find_backend("auto", "cuda") is found
    backends._warn_without_cuda.cache_clear()
