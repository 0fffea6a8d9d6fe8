"""What a step asks of many tensors: the extension and plain Python give the same answers."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import pytest
import torch

from maxva_kernels import layouts

native = layouts.native
pytestmark = pytest.mark.skipif(native is None, reason="there is no extension")

BASE = torch.arange(240.0)
#: Pairs of them differ in one thing alone, or in nothing but their addresses.
TENSORS: dict[str, Any] = {
    "vector": lambda: BASE[:24],
    "elsewhere": lambda: BASE[24:48],
    "shorter": lambda: BASE[:23],
    "with gaps": lambda: BASE[:48:2],
    "matrix": lambda: BASE[:24].view(4, 6),
    "other rows": lambda: BASE[:24].view(6, 4),
    "transposed": lambda: BASE[:24].view(6, 4).t(),
    "one row": lambda: BASE[:24].view(1, 24),
    "one row, other stride": lambda: BASE[:24].as_strided((1, 24), (7, 1)),
    "one column": lambda: BASE[:24].view(24, 1),
    "expanded": lambda: BASE[:6].expand(4, 6),
    "empty": lambda: BASE[:0],
    "empty matrix": lambda: BASE[:0].view(0, 6),
    "empty rows": lambda: BASE[:0].view(6, 0),
    "empty matrix, transposed": lambda: BASE[:0].view(6, 0).t(),
    "empty matrix with gaps": lambda: BASE[:0].as_strided((0, 3), (5, 6)),
    "empty images": lambda: BASE[:0].view(0, 3, 2, 2),
    "empty images, channels last": lambda: BASE[:0].view(0, 2, 2, 3).permute(0, 3, 1, 2),
    "channels last": lambda: BASE[:24].view(2, 2, 3, 2).permute(0, 3, 1, 2),
    "columns of a matrix": lambda: BASE[:24].view(4, 6)[:, :5],
    "scalar": lambda: BASE[3],
    "integers": lambda: BASE[:24].view(torch.int32),
    "half": lambda: BASE[:24].half(),
    "parameter": lambda: torch.nn.Parameter(BASE[:24].clone()),
    "on meta": lambda: BASE[:24].to("meta"),
}


@pytest.fixture
def in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "native", None)


@pytest.mark.usefixtures("in_python")
def test_facts_differ_where_pythons_do() -> None:
    made = {name: make() for name, make in TENSORS.items()}
    for (one, a), (other, b) in itertools.product(made.items(), repeat=2):
        same = layouts.facts_of([a]) == layouts.facts_of([b])
        assert same == (native.facts_of([a], False) == native.facts_of([b], False)), (one, other)
        if "on meta" not in (one, other):
            at_once = native.facts_of([a], True) == native.facts_of([b], True)
            assert at_once == (same and a.data_ptr() == b.data_ptr()), (one, other)


def test_facts_are_of_every_tensor() -> None:
    tensors = [BASE[:24], BASE[24:48].view(4, 6), BASE[48:]]
    found = native.facts_of(tensors, True)
    assert found == native.facts_of(tuple(tensors), True)
    for i, other in enumerate([BASE[1:25], BASE[24:48].view(6, 4).t(), BASE[49:]]):
        assert native.facts_of([*tensors[:i], other, *tensors[i + 1 :]], True) != found
    assert native.facts_of(tensors[:2], True) != found
    assert native.facts_of([], True) == b""


@pytest.mark.usefixtures("in_python")
def test_fit_is_pythons() -> None:
    made = {name: make() for name, make in TENSORS.items() if name != "on meta"}
    outcomes = set()
    for (one, a), (other, b) in itertools.product(made.items(), repeat=2):
        for dtype in (torch.float32, torch.int32):
            fits = layouts.fit([BASE.to(dtype), a], [BASE, b], dtype)
            assert fits == native.fit([BASE.to(dtype), a], [BASE, b], dtype), (one, other, dtype)
            outcomes.add(fits)
    assert outcomes == {False, True}


@pytest.mark.parametrize("name", TENSORS)
def test_dense_is_every_place_in_a_piece_of_memory_once(name: str) -> None:
    tensor = TENSORS[name]()
    shape, stride = tensor.shape, tensor.stride()
    indices = itertools.product(*map(range, shape))
    places = sorted((sum(map(operator.mul, index, stride)), index[:1]) for index in indices)
    dense = [place for place, _ in places] == list(range(tensor.numel()))
    assert layouts.is_dense(shape, stride) == dense
    if shape:
        rows = [row for _, row in places]
        assert layouts.rows_are_dense(shape, stride) == (dense and rows == sorted(rows))


def test_a_sparse_tensor_is_no_dense_one() -> None:
    found = native.facts_of([BASE], False)
    assert native.facts_of([BASE.to_sparse()], False) != found
    with pytest.raises(RuntimeError):
        native.facts_of([BASE.to_sparse()], True)
