"""optimizer.stats(): right values, from a pass whose results do not change."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from typing import Any

import pytest
import torch
from exactness import FUSED, REFERENCE, params_of, realistic_problem, same_bits, snapshot, take_step
from torch import Tensor
from torch.nn import Parameter

from maxva_kernels import FusedMAdam, MAdam
from maxva_kernels.hyper import ROW, hyper_row
from maxva_kernels.reference import complement_of_beta

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(17,), (33, 41), (0,), (40000,), (5, 3)]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "l2_nesterov_maximize": {
        "weight_decay": 0.1, "adam_w_mode": False, "nesterov": True, "maximize": True,
    },
    "amsgrad": {"amsgrad": True},
    "trust_ratio": {"trust_ratio": True, "weight_decay": 0.1},
    "clipped": {"max_grad_norm": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_results_are_the_same_bits(
    options: dict[str, Any], dtype: torch.dtype, backend: str, algorithm: str
) -> None:
    problem = realistic_problem(SHAPES, algorithm, dtype=dtype, **options)
    off, on = (problem.optimizer(backend, collect_stats=collect) for collect in (False, True))
    for _ in range(2):
        off.step()
        on.step()
    assert same_bits(snapshot(on), snapshot(off))
    assert on.stats()[0]["mean_beta"] > 0


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_values_are_those_of_the_definition(
    options: dict[str, Any], backend: str, algorithm: str
) -> None:
    problem = realistic_problem(SHAPES, algorithm, dtype=torch.float64, beta_min=0.99, **options)
    opt = problem.optimizer(backend, collect_stats=True)
    h = dict(zip(ROW, hyper_row(opt.param_groups[0]), strict=True))
    before = [p.detach().clone() for p in params_of(opt)]
    norm = torch.cat([p.grad.flatten() for p in params_of(opt)]).norm()
    clip = min(1.0, options.get("max_grad_norm", math.inf) / norm)
    c = []
    for p, theta in zip(params_of(opt), before, strict=True):
        state = opt.state[p]
        g = p.grad * clip * (-1 if h["maximize"] else 1)
        if not h["adam_w_mode"]:
            g = g + h["weight_decay"] * theta
        c.append(
            complement_of_beta(
                g, state["maxva_avg"], state["exp_avg_sq"], state["maxva_weight"], h
            ).flatten()
        )
    opt.step()
    (stats,) = opt.stats()
    beta = 1 - torch.cat(c)
    assert stats["mean_beta"] == pytest.approx(beta.mean().item(), rel=1e-9)
    for name, bound in [("share_at_beta_min", h["beta_low"]), ("share_at_beta_max", 0.999)]:
        share = ((beta - bound).abs() < 1e-15).double().mean().item()
        assert 0 < share < 1
        assert stats[name] == pytest.approx(share, abs=1e-3)
    assert stats["grad_norm"] == pytest.approx(norm.item(), rel=1e-12)
    assert stats["skipped_steps"] == 0
    if options.get("trust_ratio"):  # then the decay is part of the layer's update
        return
    decay = h["weight_decay"] * h["adam_w_mode"]
    moved = [
        (p.detach() - theta * (1 - 0.1 * decay)).abs().flatten()
        for p, theta in zip(params_of(opt), before, strict=True)
    ]
    assert stats["mean_step_size"] == pytest.approx(torch.cat(moved).mean().item(), rel=1e-6)


def test_step_size_includes_the_trust_ratio(backend: str, algorithm: str) -> None:
    """The ratio of the means of two runs, with it and without, is r."""
    theta, g = torch.linspace(1, 3, 50), torch.linspace(-1, 2, 50)

    def run(trust_ratio: bool) -> tuple[Tensor, float]:
        p = Parameter(theta.clone())
        p.grad = g.clone()
        opt = FUSED[algorithm](
            [p], lr=1e-2, weight_decay=1e-9, trust_ratio=trust_ratio, collect_stats=True,
            backend=backend,
        )  # fmt: skip
        opt.step()
        return theta - p.detach(), opt.stats()[0]["mean_step_size"]

    plain, plain_size = run(False)
    scaled, scaled_size = run(True)
    r = (scaled.double().norm() / plain.double().norm()).item()
    assert r > 1.5
    assert scaled_size / plain_size == pytest.approx(r, rel=1e-4)
    assert plain_size == pytest.approx(plain.abs().double().mean().item(), rel=1e-4)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_agree_with_the_reference(
    options: dict[str, Any], dtype: torch.dtype, kernel: str, algorithm: str
) -> None:
    problem = realistic_problem(SHAPES, algorithm, dtype=dtype, **options)
    found, expected = (
        take_step(problem.optimizer(backend, collect_stats=True), grad_scale=64.0).stats()[0]
        for backend in (kernel, None)
    )
    assert found.keys() == expected.keys()
    for name, value in found.items():
        # float32 rounding decides for a few coordinates on which side of a bound they are
        few = 1e-3 if name.startswith("share") else 0
        assert value == pytest.approx(expected[name], rel=1e-4, abs=few), name


def test_gradient_norm_is_unscaled_and_not_clipped(backend: str) -> None:
    problem = realistic_problem(SHAPES, max_grad_norm=1e-3)
    opt = problem.optimizer(backend, collect_stats=True)
    norm = torch.cat([p.grad.flatten() for p in params_of(opt)]).double().norm() / 8
    take_step(opt, grad_scale=8.0)
    assert opt.stats()[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-6)


@pytest.mark.parametrize("grad_scale", [None, 2.0])
@pytest.mark.parametrize("trust_ratio", [False, True])
@pytest.mark.parametrize("size", [1e-24, 3e17, 3e19])
def test_gradient_norm_over_the_range_of_float(
    size: float, trust_ratio: bool, grad_scale: float | None, backend: str
) -> None:
    """Squares leave it; 3e19 is beyond the update's own limit, but not beyond the norm's."""
    torch.manual_seed(0)
    p = Parameter(torch.ones(40001))
    p.grad = torch.randn(p.shape) * size
    norm = p.grad.double().norm().item() / (grad_scale or 1)
    opt = FusedMAdam([p], collect_stats=True, trust_ratio=trust_ratio, backend=backend)
    take_step(opt, grad_scale=grad_scale)
    assert opt.stats()[0]["grad_norm"] == pytest.approx(norm, rel=1e-5, abs=0)


def test_groups_are_told_apart(backend: str) -> None:
    """Two groups in one batch, one of another dtype's batch too, and one that does not collect."""
    torch.manual_seed(0)
    params = [Parameter(torch.randn(n)) for n in (10, 20, 30)]
    params.append(Parameter(torch.randn(40).double()))
    groups = [
        {"params": [params[0], params[3]]},
        {"params": [params[1]], "collect_stats": False},
        {"params": [params[2]], "lr": 0.5},
    ]
    opt = FusedMAdam(groups, lr=0.1, collect_stats=True, backend=backend)
    for p in params:
        p.grad = torch.randn_like(p)
    before = [p.detach().clone() for p in params]
    opt.step()
    first, off, last = opt.stats()
    assert off == {}
    moved = [(p.detach() - b).abs().double() for p, b in zip(params, before, strict=True)]
    both = torch.cat([moved[0], moved[3]]).mean().item()
    assert first["mean_step_size"] == pytest.approx(both, rel=1e-5)
    assert last["mean_step_size"] == pytest.approx(moved[2].mean().item(), rel=1e-5)
    norm = torch.cat([params[0].grad, params[3].grad]).norm().item()
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-6)


def test_skipped_steps_are_counted_and_leave_the_values(backend: str) -> None:
    problem = realistic_problem(SHAPES, skip_nonfinite=True)
    opt = problem.optimizer(backend, collect_stats=True)
    opt.step()
    (before,) = opt.stats()
    take_step(opt, found_inf=2.0)
    params_of(opt)[1].grad[0, 0] = torch.nan
    opt.step()
    (after,) = opt.stats()
    assert after == {**before, "skipped_steps": 2}
    params_of(opt)[1].grad[0, 0] = 1.0
    opt.step()
    (moved,) = opt.stats()
    assert moved["skipped_steps"] == 2
    assert moved["mean_beta"] != before["mean_beta"]


def test_before_the_first_step_and_without_gradients(backend: str) -> None:
    p = Parameter(torch.ones(3))
    opt = FusedMAdam([p], collect_stats=True, backend=backend)

    def tells_nothing() -> None:
        (stats,) = opt.stats()
        assert stats.pop("skipped_steps") == 0
        assert stats
        assert all(map(math.isnan, stats.values()))

    tells_nothing()
    opt.step()
    tells_nothing()
    p.grad = torch.ones(3)
    opt.step()
    # at a coordinate's first observation beta is betas[1]
    assert opt.stats()[0]["mean_beta"] == pytest.approx(0.999)
    assert opt.stats()[0]["share_at_beta_max"] == 1
    p.grad = None
    opt.step()
    tells_nothing()


def test_a_skipped_step_with_other_gradients_leaves_the_values(backend: str) -> None:
    params = [Parameter(torch.ones(4)), Parameter(torch.ones(6))]
    opt = FusedMAdam(params, collect_stats=True, skip_nonfinite=True, backend=backend)
    for p in params:
        p.grad = torch.full_like(p, 2.0)
    opt.step()
    (before,) = opt.stats()
    params[1].grad = None
    params[0].grad = torch.full_like(params[0], torch.nan)
    opt.step()
    assert opt.stats() == [{**before, "skipped_steps": 1}]


def test_a_failed_step_leaves_the_values(backend: str) -> None:
    params = [Parameter(torch.ones(4)), Parameter(torch.ones(6))]
    opt = FusedMAdam(params, collect_stats=True, backend=backend)
    params[0].grad = torch.ones(4)
    opt.step()
    before = opt.stats()
    params[1].grad = torch.ones(6)
    opt.state[params[1]] = {k: x.clone() for k, x in opt.state[params[0]].items()}
    with pytest.raises((ValueError, RuntimeError), match="shape"):
        opt.step()
    assert opt.stats() == before


def test_parameters_added_later_are_counted(backend: str) -> None:
    opt = FusedMAdam([Parameter(torch.ones(4))], collect_stats=True, backend=backend)
    params_of(opt)[0].grad = torch.full((4,), 2.0)
    opt.step()
    opt.add_param_group({"params": [Parameter(torch.ones(9))]})
    params_of(opt)[1].grad = torch.full((9,), 3.0)
    opt.step()
    assert [group["grad_norm"] for group in opt.stats()] == pytest.approx([4.0, 9.0])


def test_groups_may_change_before_anybody_asks(backend: str) -> None:
    a, b, c = (Parameter(torch.ones(n)) for n in (2, 3, 4))
    for p in (a, b, c):
        p.grad = torch.full_like(p, float(p.numel()))
    opt = FusedMAdam([{"params": [a]}, {"params": [c]}], collect_stats=True, backend=backend)
    opt.step()
    before = opt.stats()
    opt.param_groups[0]["params"].append(b)
    assert opt.stats() == before
    opt.step()
    norm = math.sqrt(a.numel() ** 3 + b.numel() ** 3)
    assert [group["grad_norm"] for group in opt.stats()] == pytest.approx([norm, 8.0])
    opt.param_groups.pop(0)
    assert [group["grad_norm"] for group in opt.stats()] == pytest.approx([8.0])
    take_step(opt, found_inf=1.0)  # what belonged to others does not come back
    (stats,) = opt.stats()
    assert math.isnan(stats["grad_norm"])
    opt.step()
    assert [group["grad_norm"] for group in opt.stats()] == pytest.approx([8.0])


def test_removed_parameters_are_let_go() -> None:
    p, q = Parameter(torch.ones(2)), Parameter(torch.ones(3))
    p.grad, q.grad = torch.ones(2), torch.ones(3)
    opt = FusedMAdam([{"params": [p]}, {"params": [q]}], collect_stats=True)
    opt.step()
    opt.param_groups.pop()
    del opt.state[q]
    gone = weakref.ref(q)
    del q
    assert [group["grad_norm"] for group in opt.stats()] == pytest.approx([math.sqrt(2)])
    opt.step()
    gc.collect()
    assert gone() is None


def test_contents_of_parameters_may_be_swapped(backend: str) -> None:
    """As module.to and load_state_dict do it where parameters are DTensors."""
    model = torch.nn.Linear(4, 3)
    opt = FusedMAdam(model.parameters(), collect_stats=True, backend=backend)
    model(torch.ones(2, 4)).sum().backward()
    opt.step()
    before = opt.stats()
    opt.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.bfloat16)
        model.load_state_dict(model.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert model.weight.dtype == torch.bfloat16
    assert opt.stats() == before


def test_default_device_does_not_matter(backend: str) -> None:
    p = Parameter(torch.ones(4))
    p.grad = torch.full((4,), 2.0)
    opt = FusedMAdam([p], collect_stats=True, max_grad_norm=1.0, backend=backend)
    with torch.device("meta"):
        opt.step()
        assert [group["grad_norm"] for group in opt.stats()] == pytest.approx([4.0])


def test_a_loaded_dict_brings_its_own_choice(backend: str) -> None:
    off, on = (
        FusedMAdam([Parameter(torch.ones(4))], collect_stats=collect, backend=backend)
        for collect in (False, True)
    )
    on.load_state_dict(off.state_dict())
    with pytest.raises(RuntimeError, match="loaded state dict"):
        on.stats()


def test_a_skipped_first_step_tells_nothing(backend: str) -> None:
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    opt = FusedMAdam([p], collect_stats=True, backend=backend)
    take_step(opt, found_inf=1.0)
    (stats,) = opt.stats()
    assert stats["skipped_steps"] == 1
    assert math.isnan(stats["mean_beta"])
    assert math.isnan(stats["grad_norm"])


def test_gradients_that_come_and_go(backend: str) -> None:
    """Values are of the parameters that the last step moved."""
    params = [Parameter(torch.ones(4)), Parameter(torch.ones(6))]
    opt = FusedMAdam(params, collect_stats=True, backend=backend)
    for pattern in [(1.0, 2.0), (None, 3.0), (4.0, None), (5.0, 6.0)]:
        for p, g in zip(params, pattern, strict=True):
            p.grad = None if g is None else torch.full_like(p, g)
        opt.step()
        squares = sum(p.numel() * g * g for p, g in zip(params, pattern, strict=True) if g)
        assert opt.stats()[0]["grad_norm"] == pytest.approx(squares**0.5)


@pytest.mark.parametrize("cls", [*FUSED.values(), *REFERENCE.values()])
def test_asking_without_collecting_is_an_error(cls: Any) -> None:
    opt = cls([Parameter(torch.ones(1))])
    with pytest.raises(RuntimeError, match="collect_stats=True"):
        opt.stats()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_copies_start_anew(copied: Any) -> None:
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    opt = MAdam([p], collect_stats=True)
    opt.step()
    other = copied(opt)
    assert math.isnan(other.stats()[0]["mean_beta"])
    for q in params_of(other):
        q.grad = torch.ones(3)
    other.step()
    assert other.stats()[0]["mean_beta"] > 0


def test_switched_on_and_off_in_the_group(backend: str) -> None:
    problem = realistic_problem(SHAPES)
    opt = problem.optimizer(backend)
    opt.step()
    opt.param_groups[0]["collect_stats"] = True
    opt.step()
    on = opt.stats()
    assert on[0]["mean_beta"] > 0
    opt.param_groups[0]["collect_stats"] = False
    opt.step()
    with pytest.raises(RuntimeError, match="collect_stats"):
        opt.stats()
