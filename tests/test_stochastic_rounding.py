"""Stochastic rounding of bfloat16 parameters: which bits, how often up, and independent of what."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from exactness import FUSED, REFERENCE, in_layout, same_bits
from torch import Tensor
from torch.nn import Parameter

from maxva_kernels import FusedMAdam
from maxva_kernels.rounding import philox, random_words

pytestmark = pytest.mark.usefixtures("one_thread")

#: Decay by this at lr 1 is exact in float32, so that every backend rounds the very same numbers.
DECAY = 2.0**-10
EXACT: dict[str, Any] = {"lr": 1.0, "weight_decay": DECAY, "stochastic_rounding": True}


def decayed(params: list[Tensor], backend: str, steps: int = 1, **options: Any) -> list[Tensor]:
    """Parameters after steps whose gradient is 0, so that only the decay moves them."""
    moved = [Parameter(p.clone(memory_format=torch.preserve_format)) for p in params]
    opt = FusedMAdam(moved, backend=backend, **{**EXACT, **options})
    for _ in range(steps):
        for p in moved:
            p.grad = torch.zeros_like(p)
        opt.step()
    return [p.detach() for p in moved]


def bfloat16_values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 numbers that enclose float32 x, the one nearer to 0 first."""
    bits = x.view(torch.int32)
    down = (bits & ~0xFFFF).view(torch.float32)
    up = ((bits & ~0xFFFF) + 0x10000).view(torch.float32)
    return down.bfloat16(), up.bfloat16()


# the three vectors of Random123's kat_vectors for philox4x32 with 7 rounds
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    a, b, c, d = counter
    words = philox((torch.tensor([a]), torch.tensor([b]), c, torch.tensor(d)), (key[0], key[1]))
    assert [int(word) for word in words] == expected


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "misaligned", "gappy"])
@pytest.mark.parametrize("threads", [1, 2])
def test_kernels_round_as_the_reference(layout: str, threads: int, kernel: str) -> None:
    shapes = [(3, 5), (1, 1), (127, 3), (0, 4), (32768 + 7, 1), (65, 129), ()]
    params = [in_layout(bfloat16_values(*shape, seed=i), layout) for i, shape in enumerate(shapes)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = decayed(params, kernel, steps=3, rounding_seed=2**45 + 3)
    finally:
        torch.set_num_threads(before)
    assert same_bits(found, decayed(params, "eager", steps=3, rounding_seed=2**45 + 3))
    nearest = decayed(params, "eager", steps=3, stochastic_rounding=False)
    assert not same_bits(found, nearest)


def test_every_result_is_a_neighbour_and_exact_values_stay(backend: str) -> None:
    p = bfloat16_values(20000)
    (found,) = decayed([p], backend)
    down, up = neighbours(p.float() * (1 - DECAY))
    assert ((found == down) | (found == up)).all()
    assert (found != down).any()
    assert (found != up).any()
    (kept,) = decayed([p], backend, weight_decay=0.0)
    assert same_bits(kept, p)


def test_nan_stays_nan_and_large_values_finite(backend: str) -> None:
    """A NaN whose payload the random bits could carry into another number, and the largest ones."""
    nan = torch.tensor([0x7F81, 0x7FFF, -1, -127], dtype=torch.int16).view(torch.bfloat16)
    p = torch.cat([nan, torch.tensor([3.38e38, -3.38e38]).bfloat16()]).repeat(50)
    (found,) = decayed([p], backend)
    assert torch.equal(found.isnan(), p.isnan())
    assert found[~p.isnan()].isfinite().all()


@pytest.mark.parametrize("sixteenths", [1, 4, 8, 13])
def test_rounding_up_is_as_frequent_as_it_should_be(sixteenths: int, backend: str) -> None:
    """Between two bfloat16 at a known distance, the share rounded up is a binomial one."""
    n = 200_000
    k = 16 - sixteenths
    p = torch.full((n,), 1.0).bfloat16()
    (found,) = decayed([p], backend, lr=1.0, weight_decay=k * 2.0**-12)
    x = 1 - k * 2.0**-12  # below 1, bfloat16 is spaced by 2^-8: sixteenths of it
    assert set(found.tolist()) <= {1 - 2.0**-8, 1.0}
    up = (found == 1.0).sum().item()
    share = (x - (1 - 2.0**-8)) * 2**8
    assert share == sixteenths / 16
    assert abs(up - n * share) < 5 * (n * share * (1 - share)) ** 0.5


def test_words_are_uniform_and_not_correlated() -> None:
    """Low halves of neighbouring elements, steps and parameters, 5 sigma each."""
    n = 2**17
    row = (11, 3, 0, n, n, 1)
    words = random_words(n, torch.tensor(5), row) & 0xFFFF
    centred = words.double() - 32767.5
    others = {
        "element": centred.roll(1),
        "step": (random_words(n, torch.tensor(6), row) & 0xFFFF).double() - 32767.5,
        "parameter": (random_words(n, torch.tensor(5), (11, 4, 0, n, n, 1)) & 0xFFFF) - 32767.5,
        "seed": (random_words(n, torch.tensor(5), (12, 3, 0, n, n, 1)) & 0xFFFF) - 32767.5,
    }
    variance = (2.0**32 - 1) / 12
    assert abs(centred.mean()) < 5 * (variance / n) ** 0.5
    for name, other in others.items():
        assert abs((centred * other).mean()) < 5 * variance / n**0.5, name
    counts = torch.bincount(words // 256, minlength=256).double()
    chi_squared = ((counts - n / 256) ** 2 / (n / 256)).sum()
    assert abs(chi_squared - 255) < 5 * (2 * 255) ** 0.5


def test_parts_of_a_parameter_round_as_the_whole(kernel: str) -> None:
    """Rows, columns, and rows of columns of a matrix, as shards of it would be."""
    rows, columns = 37, 23
    whole = bfloat16_values(rows, columns)
    seed, parameter = 9, 4
    numel = whole.numel()
    first_update, no_updates = torch.tensor(1), torch.zeros(())

    def rounded_part(part: Tensor, offset: int, inner_local: int, inner_global: int) -> Tensor:
        theta = part.clone(memory_format=torch.contiguous_format)
        states = [torch.zeros_like(theta, dtype=torch.float32) for _ in range(4)]
        hyper = [1.0, 0.9, 0.5, 0.999, 0.999, 1e-8, DECAY, 1e-16, 1, 1, 0, 0, 0, 0]
        operators = torch.ops.maxva
        if kernel == "triton":
            from maxva_kernels import triton_kernels as operators
        operators.update_(
            [theta], [torch.zeros_like(theta)], *([state] for state in states), [], [],
            [no_updates.clone()], [], [1], hyper, [None], None, None, None, None,
            [seed, parameter, offset, inner_local, inner_global, 1], "madam", 0,
        )  # fmt: skip
        return theta

    words = random_words(numel, first_update, (seed, parameter, 0, numel, numel, 1))
    bits = (whole.float() * (1 - DECAY)).view(torch.int32).long() & 0xFFFFFFFF
    bits = (bits + (words.view(rows, columns) & 0xFFFF)) >> 16
    expected = bits.to(torch.int16).view(torch.bfloat16)
    assert same_bits(rounded_part(whole, 0, numel, numel), expected)
    assert same_bits(rounded_part(whole[5:18], 5 * columns, 13 * columns, numel), expected[5:18])
    for begin, end in [(0, 7), (3, 4), (6, 23)]:
        part = rounded_part(whole[:, begin:end], begin, end - begin, columns)
        assert same_bits(part, expected[:, begin:end])
    part = rounded_part(whole[2:30, 9:20], 2 * columns + 9, 11, columns)
    assert same_bits(part, expected[2:30, 9:20])


def test_seed_parameter_and_step_each_change_the_bits(backend: str) -> None:
    p = bfloat16_values(4000)
    first, second = decayed([p, p], backend)
    assert not same_bits(first, second)
    assert not same_bits([first, second], decayed([p, p], backend, rounding_seed=1))
    moved = Parameter(p.clone())
    opt = FusedMAdam([moved], backend=backend, **EXACT)
    moved.grad = torch.zeros_like(moved)
    opt.step()
    once = moved.detach().clone()
    assert same_bits(once, first)
    with torch.no_grad():
        moved.copy_(p)
    opt.step()
    assert not same_bits(moved.detach(), once)


def test_where_the_counter_ends_kernels_still_round_as_the_reference(kernel: str) -> None:
    outcomes = []
    for backend in (kernel, "eager"):
        p = Parameter(bfloat16_values(4000))
        p.grad = torch.zeros_like(p)
        opt = FusedMAdam([p], backend=backend, **EXACT)
        opt.step()
        opt.state[p]["step"].fill_(2**24 - 1)
        for _ in range(2):
            opt.step()
        outcomes.append(p.detach())
    assert same_bits(*outcomes)


def test_parameters_without_a_gradient_keep_their_index(backend: str) -> None:
    p = bfloat16_values(4000)
    _, expected = decayed([p, p], backend)
    params = [Parameter(p.clone()), Parameter(p.clone())]
    params[1].grad = torch.zeros_like(p)
    FusedMAdam(params, backend=backend, **EXACT).step()
    assert same_bits(params[0].detach(), p)
    assert same_bits(params[1].detach(), expected)


def test_parameters_after_a_group_without_gradients_keep_their_index(backend: str) -> None:
    p = bfloat16_values(4000)
    expected = decayed([p, p, p], backend)[2]
    params = [Parameter(p.clone()) for _ in range(3)]
    params[2].grad = torch.zeros_like(p)
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    FusedMAdam(groups, backend=backend, **EXACT).step()
    assert same_bits(params[2].detach(), expected)


def test_parameter_whose_first_gradient_comes_late_is_rounded_so(backend: str) -> None:
    p = bfloat16_values(4000)
    expected = decayed([p, p], backend)[1]
    params = [Parameter(p.clone()) for _ in range(2)]
    opt = FusedMAdam(params, backend=backend, **EXACT)
    for q in params:
        q.grad = torch.zeros_like(p)
        opt.step()
    assert same_bits(params[1].detach(), expected)


def test_resuming_goes_on_with_the_same_bits(backend: str, algorithm: str) -> None:
    def gradients(t: int) -> Tensor:
        return bfloat16_values(333, seed=100 + t)

    def run(p: Parameter, opt: torch.optim.Optimizer, steps: range) -> None:
        for t in steps:
            p.grad = gradients(t)
            opt.step()

    options = {"lr": 1e-3, "stochastic_rounding": True, "rounding_seed": 5, "backend": backend}
    p = Parameter(bfloat16_values(333))
    opt = FUSED[algorithm]([p], **options)
    run(p, opt, range(3))
    saved = copy.deepcopy((p.detach(), opt.state_dict()))
    run(p, opt, range(3, 8))
    resumed = Parameter(saved[0])
    other = FUSED[algorithm]([resumed], lr=7.0, backend=backend)
    other.load_state_dict(saved[1])
    run(resumed, other, range(3, 8))
    assert same_bits(resumed.detach(), p.detach())


def test_small_updates_are_not_lost(backend: str, algorithm: str) -> None:
    """200 steps of 1e-5 from 1: to the nearest nothing moves, at random the mean follows."""
    generator = torch.Generator().manual_seed(3)
    grads = [torch.rand(4096, generator=generator) + 0.5 for _ in range(200)]

    def run(dtype: torch.dtype, **options: Any) -> Tensor:
        p = Parameter(torch.ones(4096, dtype=dtype))
        opt = FUSED[algorithm]([p], lr=1e-5, backend=backend, **options)
        for g in grads:
            p.grad = g.to(dtype)
            opt.step()
        return p.detach()

    assert (run(torch.bfloat16) == 1).all()
    precise = run(torch.float32).mean()
    found = run(torch.bfloat16, stochastic_rounding=True).float()
    assert precise < 0.9985
    # one step up or down is 2^-8; the mean of 4096 walks of 200 steps strays by far less
    assert abs(found.mean() - precise) < 3e-4
    assert (found != 1).any()


def test_other_parameters_do_not_notice(backend: str) -> None:
    """float32 and float64 parameters of a group with stochastic_rounding, bit for bit."""

    def run(rounds: bool) -> list[Tensor]:
        params = [
            Parameter(torch.linspace(-1, 1, 77, dtype=dtype))
            for dtype in (torch.float32, torch.float64, torch.bfloat16)
        ]
        opt = FusedMAdam(params, lr=0.1, backend=backend, stochastic_rounding=rounds)
        for p in params:
            p.grad = torch.cos(p.detach())
        opt.step()
        return [p.detach() for p in params]

    on, off = run(True), run(False)
    assert same_bits(on[:2], off[:2])
    assert not same_bits(on[2], off[2])


def test_groups_may_round_differently(backend: str) -> None:
    p = bfloat16_values(3000)
    params = [Parameter(p.clone()) for _ in range(3)]
    groups = [
        {"params": [params[0]]},
        {"params": [params[1]], "stochastic_rounding": False},
        {"params": [params[2]], "rounding_seed": 8},
    ]
    opt = FusedMAdam(groups, backend=backend, **EXACT)
    for q in params:
        q.grad = torch.zeros_like(q)
    opt.step()
    (nearest,) = decayed([p], backend, stochastic_rounding=False)
    assert same_bits(params[1].detach(), nearest)
    assert same_bits(params[0].detach(), decayed([p], backend)[0])
    assert same_bits(params[2].detach(), decayed([p] * 3, backend, rounding_seed=8)[2])


def test_lr_0_and_skipped_steps_keep_the_bits(backend: str) -> None:
    p = Parameter(bfloat16_values(999))
    before = p.detach().clone()
    opt = FusedMAdam([p], **{**EXACT, "lr": 0.0}, backend=backend)
    p.grad = bfloat16_values(999, seed=1)
    opt.step()
    opt.param_groups[0]["lr"] = 1.0
    opt.found_inf = torch.tensor(1.0)
    opt.step()
    assert same_bits(p.detach(), before)


@pytest.mark.parametrize("cls", [*FUSED.values(), *REFERENCE.values()])
def test_what_cannot_be_rounded_so_is_refused(cls: Any) -> None:
    half, wide = Parameter(torch.ones(3).half()), Parameter(torch.ones(3).bfloat16())
    with pytest.raises(ValueError, match=r"0 of its group.*float16.*master_weights"):
        cls([half], stochastic_rounding=True)
    with pytest.raises(ValueError, match="master_weights"):
        cls([wide], stochastic_rounding=True, master_weights=True)
    cls([wide], rounding_seed=1)
    for seed in (-1, 2**63, 1.5, "1", 1.0):
        with pytest.raises(ValueError, match="rounding_seed"):
            cls([wide], rounding_seed=seed)


def test_parameter_that_became_float16_stops_the_step(backend: str) -> None:
    p, other = Parameter(torch.ones(3).bfloat16()), Parameter(torch.ones(3))
    opt = FusedMAdam([other, p], stochastic_rounding=True, backend=backend)
    p.data = p.data.half()
    p.grad, other.grad = torch.ones(3).half(), torch.ones(3)
    with pytest.raises(ValueError, match=r"1 of its group.*float16"):
        opt.step()
    assert (other == 1).all()
    assert not opt.state
