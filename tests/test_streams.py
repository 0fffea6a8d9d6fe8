"""States of large CPU parameters begin at places of their own within a page."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from maxva_kernels import FusedMAdam

PAGE, BLOCK = 4096, 512
#: As matrices of BERT: 18 times 128 KiB, a distance at which caches do not tell lists apart.
SHAPE = (768, 768)


def stepped(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32, **options):
    p = torch.randn(shape, dtype=dtype).requires_grad_()
    p.grad = torch.randn_like(p)
    optimizer = FusedMAdam([p], **options)
    optimizer.step()
    return p, optimizer


def lists(p: torch.Tensor, optimizer: FusedMAdam) -> dict[str, torch.Tensor]:
    states = {k: v for k, v in optimizer.state[p].items() if v.shape == p.shape}
    return {"param": p, **states}


def assert_apart(of_step: dict[str, torch.Tensor]) -> None:
    taken: dict[int, str] = {}
    for name, tensor in of_step.items():
        assert tensor.data_ptr() % 64 == 0, name
        for line in range(128 * tensor.element_size() // 64):
            place = (tensor.data_ptr() + 64 * line) % PAGE
            assert place not in taken, f"{name} meets {taken[place]} at {place}"
            taken[place] = name


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"amsgrad": True}),
        (torch.bfloat16, {"master_weights": True}),
        (torch.float32, {"state_dtype": "int8", "amsgrad": True}),
        (torch.float32, {"state_dtype": "bfloat16", "amsgrad": True}),
    ],
    ids=["amsgrad", "master", "int8", "bfloat16"],
)
def test_lists_of_a_step_share_no_place_within_a_page(dtype, options):
    p, optimizer = stepped(dtype=dtype, **options)
    of_step = lists(p, optimizer)
    assert len(of_step) == (3 if "state_dtype" in options else 6)
    assert_apart(of_step)
    for name, tensor in of_step.items():  # by more than luck
        assert (tensor.data_ptr() - p.data_ptr()) % PAGE % (BLOCK + 64) == 0, name


def test_loaded_states_are_placed_like_new_ones():
    p, optimizer = stepped()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = torch.randn(SHAPE).requires_grad_()
    resumed = FusedMAdam([other])
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert_apart(lists(other, resumed))
    for key, value in lists(p, optimizer).items():
        if key != "param":
            assert torch.equal(resumed.state[other][key], value), key


def test_placing_takes_a_page_at_most_and_leaves_no_base():
    p, optimizer = stepped()
    for key, value in lists(p, optimizer).items():
        if key != "param":
            assert value._base is None
            assert value.untyped_storage().nbytes() <= value.nbytes + PAGE
            assert copy.deepcopy(value).equal(value)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_layout_is_the_parameters(memory_format):
    p = torch.randn(64, 32, 16, 16).to(memory_format=memory_format).requires_grad_()
    p.grad = torch.randn_like(p)
    optimizer = FusedMAdam([p])
    optimizer.step()
    for value in lists(p, optimizer).values():
        assert value.stride() == p.stride()


def test_states_lie_on_their_parameters_device_whatever_the_default_is():
    p = torch.randn(SHAPE).requires_grad_()
    p.grad = torch.randn_like(p)
    optimizer = FusedMAdam([p])
    with torch.device("meta"):
        optimizer.step()
    assert {value.device for value in optimizer.state[p].values()} == {p.device}


def test_small_states_are_tensors_as_any():
    p, optimizer = stepped(shape=(256, 256))
    for key, value in lists(p, optimizer).items():
        if key != "param":
            assert value.storage_offset() == 0
            assert value.untyped_storage().nbytes() == value.nbytes
