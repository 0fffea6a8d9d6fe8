"""Fixtures: the backends that run on CPU tensors here, and memory that starts as NaN."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import maxva_kernels
from maxva_kernels import layouts

# a shell starts what it puts in the background deaf to Ctrl-C, which some tests send
signal.signal(signal.SIGINT, signal.default_int_handler)

REPORT = maxva_kernels.backends()
#: Backends other than the reference. "cpu" is never left out: where it is missing, tests fail.
KERNELS = ["cpu"]
if os.environ.get("TRITON_INTERPRET") == "1" and REPORT.get("triton") == "available":
    KERNELS.append("triton")


@pytest.fixture(params=["eager", *KERNELS])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that runs on CPU tensors here."""
    return request.param


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    """Every such backend but the eager reference."""
    return request.param


@pytest.fixture(params=["madam", "lamadam"])
def algorithm(request: pytest.FixtureRequest) -> str:
    """Both optimizers, by the names the operators use."""
    return request.param


@pytest.fixture(params=["extension", "python"])
def asked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who answers what a step asks of many tensors (layouts.py)."""
    if request.param == "python":
        monkeypatch.setattr(layouts, "native", None)
    elif layouts.native is None:
        pytest.skip("there is no extension")
    return request.param


@pytest.fixture
def use_isa() -> Iterator[Callable[[str], None]]:
    """Chooses the instruction set of the CPU kernels for one test, as MAXVA_CPU_ISA at import."""
    from maxva_kernels import _C

    yield _C.use_cpu_isa
    _C.use_cpu_isa(os.environ.get("MAXVA_CPU_ISA", ""))


@pytest.fixture
def nan_filled_memory() -> Iterator[None]:
    """Every torch.empty starts as NaN, so that an element nobody writes is noticed."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = before[2]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, unless the test asks for more: many small steps are slow on busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus for tiny runs of the BERT pretraining example."""
    from bert_runs import write_corpus

    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.txt")
