"""State dicts: precision, refusal, conversion, and going on as if never stopped."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from exactness import same_bits
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import maxva_kernels
from maxva_kernels import FusedLaMAdam, FusedMAdam, load_reference_state

SHAPES = [(5, 7), (3,), (), (0, 4)]
CLASSES = [FusedMAdam, FusedLaMAdam]


def make_params(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES
    ]


def train(params, optimizer, begin, end):
    """Steps begin..end with gradients that depend on the step alone."""
    for t in range(begin, end):
        generator = torch.Generator().manual_seed(1000 + t)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p)
        optimizer.step()


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(params, optimizer, other_params, other):
    for p, q in zip(params, other_params, strict=True):
        assert torch.equal(p, q)
        state, other_state = optimizer.state[p], other.state[q]
        assert state.keys() == other_state.keys()
        for key, value in state.items():
            assert value.dtype == other_state[key].dtype, key
            assert torch.equal(value, other_state[key]), key
    for group, other_group in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {
            k: v for k, v in other_group.items() if k != "params"
        }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("cls", CLASSES)
def test_save_load_and_go_on_equals_never_having_stopped(cls, dtype, backend):
    options = {"backend": backend, "master_weights": True, "amsgrad": True, "weight_decay": 0.1}
    params = make_params(dtype)
    optimizer = cls(params, **options)
    train(params, optimizer, 0, 3)
    saved = through_a_file({"params": [p.data for p in params], "opt": optimizer.state_dict()})
    train(params, optimizer, 3, 7)

    resumed_params = [torch.nn.Parameter(p) for p in saved["params"]]
    resumed = cls(resumed_params, **options)
    resumed.load_state_dict(saved["opt"])
    train(resumed_params, resumed, 3, 7)
    assert_same(params, optimizer, resumed_params, resumed)
    assert resumed.param_groups[0]["step"] == 7


def test_state_goes_on_under_other_backends(kernel):
    """From the reference to a kernel and back; the same as the reference throughout."""
    params, other_params = make_params(), make_params()
    optimizer = FusedMAdam(params, backend="eager", amsgrad=True)
    train(params, optimizer, 0, 2)
    for begin, backend in ((2, kernel), (4, "eager"), (6, kernel)):
        saved = through_a_file(optimizer.state_dict())
        optimizer = FusedMAdam(params, backend=backend, amsgrad=True)
        optimizer.load_state_dict(saved)
        train(params, optimizer, begin, begin + 2)
    other = FusedMAdam(other_params, backend="eager", amsgrad=True)
    train(other_params, other, 0, 8)
    for p, q in zip(params, other_params, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
        assert optimizer.state[p]["step"] == 8
    assert optimizer.param_groups[0]["step"] == 8


def test_a_wider_state_beside_bfloat16_is_not_rounded():
    params = make_params(torch.bfloat16)
    optimizer = FusedMAdam(params)
    train(params, optimizer, 0, 2)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.load_state_dict(optimizer.state_dict())
    for index, p in enumerate(params):
        for key, value in optimizer.state[p].items():
            assert value.dtype == torch.float32, key
            assert torch.equal(value, before[index][key]), key
    lossy = before[0]["exp_avg"]
    assert not torch.equal(lossy, lossy.bfloat16().float())  # rounding would have shown


def test_users_hooks_still_fire_and_see_tensors():
    params = make_params()
    optimizer = FusedMAdam(params)
    train(params, optimizer, 0, 1)
    seen = []

    def halve(opt, state_dict):
        seen.append("pre")
        state_dict = copy.deepcopy(state_dict)
        for values in state_dict["state"].values():
            values["exp_avg"] = values["exp_avg"] / 2
        return state_dict

    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append("post"))
    m = optimizer.state[params[0]]["exp_avg"].clone()
    for _ in range(2):
        optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["pre", "post"] * 2
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], m / 4)


def test_an_older_dict_takes_the_defaults_and_foreign_keys_stay():
    params = make_params()
    optimizer = FusedMAdam(params, skip_nonfinite=True)
    train(params, optimizer, 0, 1)
    old = copy.deepcopy(optimizer.state_dict())
    del old["param_groups"][0]["skip_nonfinite"], old["param_groups"][0]["delta"]
    old["param_groups"][0]["initial_lr"] = 0.5
    for values in old["state"].values():
        values["step"] = 1  # a plain number
    optimizer.load_state_dict(old)
    group = optimizer.param_groups[0]
    assert group["skip_nonfinite"] is True
    assert group["delta"] == 1e-16
    assert group["initial_lr"] == 0.5
    step = optimizer.state[params[0]]["step"]
    assert step.dtype == torch.float32
    assert step.shape == ()
    train(params, optimizer, 1, 2)
    assert optimizer.state[params[0]]["step"] == 2


def test_what_an_older_dict_lacks_is_checked_as_its_default():
    """Not as the value that the loading optimizer has now."""
    optimizer = FusedMAdam([{"params": make_params(torch.bfloat16), "stochastic_rounding": True}])
    old = copy.deepcopy(optimizer.state_dict())
    del old["param_groups"][0]["stochastic_rounding"]
    old["param_groups"][0]["master_weights"] = True
    optimizer.load_state_dict(old)
    assert optimizer.param_groups[0]["stochastic_rounding"] is False


def test_master_weights_missing_from_a_dict_are_made_from_the_parameter():
    params = make_params(torch.bfloat16)
    plain = FusedMAdam(params)
    train(params, plain, 0, 1)
    optimizer = FusedMAdam(params, master_weights=True)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": plain.state_dict()["state"], "param_groups": groups})
    train(params, optimizer, 1, 2)
    master = optimizer.state[params[0]]["master_param"]
    assert master.dtype == torch.float32
    assert torch.equal(master.bfloat16(), params[0])


def _state_value(index, key, value):
    return lambda state_dict: state_dict["state"][index].update({key: value})


def _group_value(index, key, value):
    return lambda state_dict: state_dict["param_groups"][index].update({key: value})


def _without_maxva(state_dict):
    del state_dict["state"][0]["maxva_avg"], state_dict["state"][0]["maxva_weight"]


BROKEN = {
    "another optimizer's": (_without_maxva, r"parameter 0 .*lacks maxva_avg, maxva_weight"),
    "no step": (lambda d: d["state"][1].pop("step"), r"parameter 1 .*lacks step"),
    "another model's": (
        _state_value(0, "exp_avg_sq", torch.zeros(7, 5)),
        r"parameter 0 .*exp_avg_sq has shape \(7, 5\)",
    ),
    "a maximum of another shape": (
        _state_value(1, "max_exp_avg_sq", torch.zeros(4)),
        r"parameter 1 .*max_exp_avg_sq has shape \(4,\)",
    ),
    "several steps": (
        _state_value(2, "step", torch.zeros(2)),
        r"parameter 0 of its group.*step is tensor\(\[0., 0.\]\); it must be one number",
    ),
    "no number for a step": (_state_value(0, "step", "abc"), r"parameter 0 .*step is 'abc'"),
    "None for a step": (_state_value(0, "step", None), r"parameter 0 .*step is None"),
    "NaN for a step": (_state_value(0, "step", torch.tensor(math.nan)), r"parameter 0 .*step is"),
    "a negative step": (_state_value(0, "step", -1.0), r"parameter 0 .*step is -1.0"),
    "a complex step": (_state_value(0, "step", torch.tensor(1j)), r"parameter 0 .*step is"),
    "a group's step of None": (_group_value(1, "step", None), "group 1: the loaded step is None"),
    "a group's infinite step": (_group_value(1, "step", math.inf), "group 1: the loaded step is"),
    "a number for a moment": (_state_value(1, "exp_avg", 0.5), r"exp_avg is no tensor but 0.5"),
    "a parameter less": (lambda d: d["param_groups"][0]["params"].pop(), "doesn't match the size"),
    "a group less": (lambda d: d["param_groups"].pop(), "different number of parameter groups"),
    "two lr in one": (_group_value(1, "lr", torch.zeros(2)), r"Tensor lr must be 1-element"),
    "NaN lr": (_group_value(1, "lr", float("nan")), "lr must be finite"),
    "betas out of range": (_group_value(0, "betas", (0.9, 1.5)), r"betas\[1\]"),
    "groups at odds": (_group_value(1, "max_grad_norm", 1.0), "max_grad_norm concerns the whole"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_does_not_fit_is_refused_and_nothing_changes(kind):
    params = make_params()
    optimizer = FusedMAdam([{"params": params[:2]}, {"params": params[2:]}])
    train(params, optimizer, 0, 2)
    values = [(p.data_ptr(), p.clone(), p.grad.clone()) for p in params]
    before, broken = (copy.deepcopy(optimizer.state_dict()) for _ in range(2))
    change, message = BROKEN[kind]
    change(broken)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(broken)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, state in before["state"].items():
        assert state.keys() == after["state"][index].keys()
        for key, value in state.items():
            assert torch.equal(after["state"][index][key], value)
    # what fits loads, and neither way touches parameters or gradients
    optimizer.load_state_dict(before)
    for p, (address, value, g) in zip(params, values, strict=True):
        assert p.data_ptr() == address
        assert torch.equal(p, value)
        assert torch.equal(p.grad, g)


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "inf")])
@pytest.mark.parametrize("key", ["maxva_avg", "exp_avg_sq"])
def test_what_is_not_finite_in_a_loaded_state_is_named(key, value, kind):
    names = ["bias", "weight"]
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in names]
    optimizer = FusedMAdam(list(zip(names, params, strict=True)))
    train(params, optimizer, 0, 1)
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["state"][1][key][1] = value
    with pytest.warns(UserWarning, match=f"'weight'.*{key} holds {kind}"):
        optimizer.load_state_dict(state_dict)


def test_loading_copies_nothing_that_is_in_place():
    """So that a checkpoint of the optimizer's size is not held twice."""
    params = make_params(torch.bfloat16)
    optimizer = FusedMAdam(params, master_weights=True)
    train(params, optimizer, 0, 1)
    saved = through_a_file(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    for index, p in enumerate(params):
        for key, value in optimizer.state[p].items():
            assert value.data_ptr() == saved["state"][index][key].data_ptr(), key


@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (64, 64, 9, 9)], ids=["small", "large"])
def test_loaded_states_take_the_layout_of_their_parameter(shape):
    """Else every step would go through temporaries."""
    p = torch.nn.Parameter(torch.ones(shape))
    optimizer = FusedMAdam([p])
    p.grad = torch.randn(shape)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    q = torch.nn.Parameter(p.detach().to(memory_format=torch.channels_last))
    other = FusedMAdam([q])
    other.load_state_dict(saved)
    for key, value in other.state[q].items():
        assert torch.equal(value, saved["state"][0][key])
        assert key == "step" or value.stride() == q.stride()
    slice_of = torch.nn.Parameter(torch.ones(2, *shape)[:, 0])  # no copy is laid out like it
    other = FusedMAdam([slice_of])
    slice_of.grad = torch.ones_like(slice_of)
    other.step()
    saved = copy.deepcopy(other.state_dict())
    other.load_state_dict(saved)
    for key, value in other.state[slice_of].items():
        assert value.data_ptr() == saved["state"][0][key].data_ptr()


def test_what_others_keep_in_a_dict_is_kept():
    params = make_params()
    optimizer = FusedMAdam(params)
    train(params, optimizer, 0, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"]["of no parameter"] = 5
    saved["state"][0]["note"] = torch.ones(5, 7)
    saved["state"][0]["noise_scale"] = torch.tensor(2.0)
    saved["state"][0]["seen"] = torch.tensor([2**24 + 1])
    saved["param_groups"][0]["name"] = "encoder"
    optimizer.load_state_dict(saved)
    train(params, optimizer, 1, 2)
    again = optimizer.state_dict()
    assert again["state"]["of no parameter"] == 5
    assert torch.equal(again["state"][0]["note"], torch.ones(5, 7))
    assert torch.equal(again["state"][0]["noise_scale"], torch.tensor(2.0))
    assert torch.equal(again["state"][0]["seen"], torch.tensor([2**24 + 1]))
    assert again["param_groups"][0]["name"] == "encoder"
    assert again["state"][0]["step"] == 2


def test_a_tensor_lr_is_loaded_as_one_of_its_own():
    params = make_params()
    optimizer = FusedMAdam(params, lr=torch.tensor([0.25]))
    saved = optimizer.state_dict()
    other = FusedMAdam(params, lr=0.1)
    other.load_state_dict(saved)
    lr = other.param_groups[0]["lr"]
    assert torch.equal(lr, torch.tensor([0.25]))
    lr.fill_(0.5)
    assert float(optimizer.param_groups[0]["lr"]) == 0.25


CUDA = maxva_kernels.backends()["cuda"]


@pytest.mark.gpu
@pytest.mark.skipif(CUDA != "available", reason=f"backend 'cuda': {CUDA}")
@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("route", [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_state_goes_on_on_another_device(route, capturable):
    options = {"lr": torch.tensor(0.01), "capturable": capturable, "amsgrad": True}
    results = []
    for devices in (route, ("cpu", "cpu")):
        params, saved = make_params(), None
        for begin, device in zip((0, 3), devices, strict=True):
            params = [torch.nn.Parameter(p.detach().to(device)) for p in params]
            optimizer = FusedMAdam(params, **options)
            if saved is not None:
                optimizer.load_state_dict(saved)
            train(params, optimizer, begin, begin + 3)
            saved = through_a_file(optimizer.state_dict())
        group = optimizer.param_groups[0]
        assert int(group["step"]) == 6
        assert isinstance(group["step"], torch.Tensor) == (device == "cuda")
        states = [x for values in optimizer.state.values() for x in values.values()]
        assert {x.device.type for x in states} == {device}
        assert group["lr"].device.type == device
        results.append([p.detach().cpu() for p in params])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_parameters_without_state_are_legal():
    params = make_params()
    optimizer = FusedMAdam(params)
    params[1].grad = torch.ones(3)
    optimizer.step()
    state_dict = copy.deepcopy(optimizer.state_dict())
    assert list(state_dict["state"]) == [1]
    optimizer.load_state_dict(state_dict)
    train(params, optimizer, 0, 1)
    assert [int(optimizer.state[p]["step"]) for p in params] == [1, 2, 1, 1]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_a_counter_of_another_kind_is_taken(dtype, shape, backend):
    params = make_params()
    optimizer = FusedMAdam(params, backend=backend)
    train(params, optimizer, 0, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = torch.full(shape, 2, dtype=dtype)
    optimizer.load_state_dict(saved)
    step = optimizer.state[params[0]]["step"]
    assert (step.dtype, step.shape) == (torch.float32, ())
    train(params, optimizer, 2, 3)
    assert optimizer.state[params[0]]["step"] == 3


def test_a_state_that_was_only_looked_at_is_legal():
    """optimizer.state is a defaultdict: asking makes an empty state, which is saved."""
    params = make_params()
    optimizer = FusedMAdam(params)
    params[1].grad = torch.ones(3)
    optimizer.step()
    assert not optimizer.state[params[0]]
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"][0] == {}
    optimizer.load_state_dict(saved)
    train(params, optimizer, 0, 1)
    assert [int(optimizer.state[p]["step"]) for p in params] == [1, 2, 1, 1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_keep_everything(copied):
    params = make_params()
    optimizer = FusedMAdam(params, backend="eager", max_grad_norm=1.0)
    train(params, optimizer, 0, 2)
    other = copied(optimizer)
    other_params = other.param_groups[0]["params"]
    assert other._backend == "eager"
    train(params, optimizer, 2, 4)
    train(other_params, other, 2, 4)
    assert_same(params, optimizer, other_params, other)


# What the authors' optimizers and Adam would have saved, by definition, at the point that one of
# ours has reached.


def authors_madam(optimizer, tensor_w):
    group = optimizer.param_groups[0]
    state = {}
    for index, p in enumerate(group["params"]):
        s = optimizer.state[p]
        state[index] = {
            "exp_avg": s["maxva_avg"],
            "exp_avg_sq": s["exp_avg_sq"],
            "exp_avg_grad": s["exp_avg"],
            "total_w": s["maxva_weight"] if tensor_w else 1 - group["betas"][1],
        }
    own = {"lr": 0.25, "eps": 1e-8, "step": group["step"], "params": [0, 1, 2, 3]}
    return {"state": state, "param_groups": [own]}


def authors_lamadam(optimizer, running_lr_key):
    group = optimizer.param_groups[0]
    alpha, lr = group["betas"][0], 0.25
    state = {}
    for index, p in enumerate(group["params"]):
        s = optimizer.state[p]
        state[index] = {
            "step": int(s["step"]),
            "g_est": s["maxva_avg"],
            "g_sq_est": s["exp_avg_sq"],
            "total_w": s["maxva_weight"],
            "update_est": lr * s["exp_avg"],
            running_lr_key: lr * (1 - alpha ** int(s["step"])),
        }
    own = {"lr": lr, "momentum": alpha, "params": [0, 1, 2, 3]}
    return {"state": state, "param_groups": [own]}


@pytest.mark.parametrize(
    ("cls", "steps", "as_saved_by", "argument"),
    [
        (FusedMAdam, 4, authors_madam, True),
        (FusedMAdam, 1, authors_madam, False),
        (FusedLaMAdam, 4, authors_lamadam, "update_avg_lr"),
        (FusedLaMAdam, 4, authors_lamadam, "update_lr_bc"),
    ],
)
def test_the_authors_checkpoints_go_on_where_they_stopped(cls, steps, as_saved_by, argument):
    params, other_params = make_params(torch.float64), make_params(torch.float64, seed=1)
    optimizer, other = cls(params, lr=0.25), cls(other_params)
    train(params, optimizer, 0, steps)
    load_reference_state(other, as_saved_by(optimizer, argument))
    for p, q in zip(params, other_params, strict=True):
        q.data.copy_(p.data)
    group = other.param_groups[0]
    assert group["lr"] == 0.25
    assert group["step"] == steps
    train(params, optimizer, steps, steps + 3)
    train(other_params, other, steps, steps + 3)
    for p, q in zip(params, other_params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-15)


def test_adamw_goes_on_as_madam_with_equal_betas():
    params, other_params = make_params(torch.float64), make_params(torch.float64)
    betas = (0.9, 0.98)
    adamw = torch.optim.AdamW(params, lr=1e-2, betas=betas, weight_decay=0.1)
    train(params, adamw, 0, 5)
    ours = FusedMAdam(other_params, betas=betas, beta_min=0.98, weight_decay=0.1)
    load_reference_state(ours, adamw.state_dict())
    for p, q in zip(params, other_params, strict=True):
        q.data.copy_(p.data)
    train(params, adamw, 5, 8)
    train(other_params, ours, 5, 8)
    for p, q in zip(params, other_params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-15)


def test_the_warm_start_from_adam_has_its_mean_and_second_moment():
    params = make_params(torch.float64)
    adam = torch.optim.Adam(params, betas=(0.8, 0.95))
    train(params, adam, 0, 3)
    ours = FusedLaMAdam(params, betas=(0.8, 0.99))
    load_reference_state(ours, adam.state_dict())
    for p in params[:3]:
        s, saved = ours.state[p], adam.state[p]
        w = s["maxva_weight"]
        torch.testing.assert_close(w, torch.full_like(w, 1 - 0.95**3), rtol=1e-14, atol=0)
        mean = saved["exp_avg"] / (1 - 0.8**3)
        second = saved["exp_avg_sq"] / (1 - 0.95**3)
        torch.testing.assert_close(s["maxva_avg"] / w, mean, rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(s["exp_avg_sq"] / w, second, rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(
            s["exp_avg"], saved["exp_avg"] / second.sqrt(), rtol=1e-12, atol=1e-14
        )


def test_the_authors_maxima_are_taken_over():
    """MAdam keeps the maximum of sqrt(v/w) + eps, 0 before the first; LaMAdam that of v."""
    params, eps = make_params(torch.float64), 0.25
    for cls in CLASSES:
        optimizer = cls(params, amsgrad=True)
        train(params, optimizer, 0, 3)
        maxima = [optimizer.state[p]["max_exp_avg_sq"].clone() for p in params]
        maxima[1].zero_()
        if cls is FusedMAdam:
            saved = authors_madam(optimizer, tensor_w=True)
            for index, vmax in enumerate(maxima):
                root = vmax.sqrt() + eps
                saved["state"][index]["max_exp_avg_sq"] = torch.where(vmax == 0, 0.0, root)
        else:
            saved = authors_lamadam(optimizer, "update_avg_lr")
            for index, vmax in enumerate(maxima):
                saved["state"][index]["max_sq_est"] = vmax * saved["state"][index]["total_w"]
        saved["param_groups"][0]["eps"] = eps
        for amsgrad in (True, False):
            other = cls(params, amsgrad=amsgrad)
            load_reference_state(other, saved)
            for p, vmax in zip(params, maxima, strict=True):
                assert ("max_exp_avg_sq" in other.state[p]) == amsgrad
                if amsgrad:
                    found = other.state[p]["max_exp_avg_sq"]
                    torch.testing.assert_close(found, vmax, rtol=1e-13, atol=0)


def test_steps_of_the_authors_warm_up_do_not_count():
    params = make_params()
    optimizer = FusedMAdam(params)
    train(params, optimizer, 0, 5)
    saved = authors_madam(optimizer, tensor_w=True)
    saved["param_groups"][0]["moment_warmup"] = 2
    other = FusedMAdam(params)
    load_reference_state(other, saved)
    assert [int(other.state[p]["step"]) for p in params] == [3] * 4
    assert other.param_groups[0]["step"] == 5


@pytest.mark.parametrize("counts", ["per parameter", "per group"])
def test_the_warm_start_takes_the_count_from_where_it_is(counts):
    """Apex's FusedAdam counts in the group."""
    params = make_params()
    adam = torch.optim.Adam(params, amsgrad=True)
    train(params, adam, 0, 3)
    saved = copy.deepcopy(adam.state_dict())
    if counts == "per group":
        saved["param_groups"][0]["step"] = 3
        for state in saved["state"].values():
            del state["step"]
    ours = FusedMAdam(params, amsgrad=True)
    with torch.device("meta"):  # the default device does not matter
        load_reference_state(ours, saved)
    assert ours.param_groups[0]["step"] == 3
    for p in params:
        assert ours.state[p]["step"] == 3
        vmax = adam.state[p]["max_exp_avg_sq"] / (1 - 0.999**3)
        torch.testing.assert_close(ours.state[p]["max_exp_avg_sq"], vmax)


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_warm_start_from_zeros_is_zeros(cls, steps):
    """Of an optimizer that has not stepped, or whose gradients were 0: nothing divided by 0."""
    params = make_params()
    adam = torch.optim.Adam(params)
    train(params, adam, 0, 1)
    saved = copy.deepcopy(adam.state_dict())
    for state in saved["state"].values():
        state["step"].fill_(steps)
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()
    ours = cls(params, eps=0.0)
    load_reference_state(ours, saved)
    for p in params:
        assert ours.state[p]["step"] == steps
        for key in ("exp_avg", "maxva_avg", "exp_avg_sq"):
            assert not ours.state[p][key].any(), key
        assert (ours.state[p]["maxva_weight"] > 0).all() == (steps > 0 or p.numel() == 0)


def test_loading_leaves_the_other_optimizer_alone():
    params = make_params()
    optimizer = FusedMAdam(params)
    train(params, optimizer, 0, 2)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    other_params = make_params()
    other = FusedMAdam(other_params)
    load_reference_state(other, authors_madam(optimizer, tensor_w=True))
    train(other_params, other, 2, 4)
    for index, p in enumerate(params):
        for key, value in before[index].items():
            assert torch.equal(optimizer.state[p][key], value), key


@pytest.mark.parametrize(
    ("state", "message"),
    [({0: {"momentum_buffer": torch.zeros(5, 7)}}, "momentum_buffer"), (None, "groups of")],
)
def test_a_dict_of_another_kind_is_refused(state, message):
    params = make_params()
    optimizer = FusedMAdam(params)
    saved = torch.optim.SGD(params if state else params[:1]).state_dict()
    with pytest.raises(ValueError, match=message):
        maxva_kernels.load_reference_state(optimizer, {**saved, "state": state or {}})
    assert not optimizer.state


@pytest.mark.parametrize("kind", ["shape", "dtype", "step", "step on another device"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_state_that_was_tampered_with_stops_the_step_before_anything_moves(which, kind, backend):
    """Of the first or the second of two batches, which amsgrad separates."""
    params = make_params()[:2]
    groups = [{"params": params[:1]}, {"params": params[1:], "amsgrad": True}]
    optimizer = FusedMAdam(groups, backend=backend)
    train(params, optimizer, 0, 2)
    state = optimizer.state[params[which]]
    if kind == "step":
        state["step"] = torch.tensor(2)
    elif kind == "step on another device":
        state["step"] = torch.zeros((), device="meta")
    else:
        state["exp_avg_sq"] = torch.ones(5) if kind == "shape" else torch.ones(3).half()
    before = copy.deepcopy((params, optimizer.state_dict()["state"]))
    with pytest.raises((ValueError, TypeError), match="step" if "step" in kind else "exp_avg_sq"):
        train(params, optimizer, 2, 3)
    assert all(torch.equal(p, q) for p, q in zip(params, before[0], strict=True))
    for index, p in enumerate(params):
        for key, value in optimizer.state[p].items():
            assert value.is_meta or torch.equal(value, before[1][index][key]), key


def test_distributed_checkpoint_loads_after_masters_were_made(tmp_path):
    """Torch takes an optimizer with any state for one that has all of it."""

    def made():
        net = torch.nn.Sequential(torch.nn.Linear(5, 3).bfloat16(), torch.nn.LayerNorm(3))
        return net, FusedMAdam(net.parameters(), master_weights=True)

    net, optimizer = made()
    for t in range(3):
        for p in net.parameters():
            p.grad = torch.full_like(p, 0.5 + t)
        optimizer.step()
    dcp.save({"optimizer": get_optimizer_state_dict(net, optimizer)}, checkpoint_id=tmp_path)

    resumed, other = made()
    other.setup_fp32_params()
    template = {"optimizer": get_optimizer_state_dict(resumed, other)}
    dcp.load(template, checkpoint_id=tmp_path)
    set_optimizer_state_dict(resumed, other, template["optimizer"])
    for p, q in zip(net.parameters(), resumed.parameters(), strict=True):
        assert same_bits(dict(optimizer.state[p]), dict(other.state[q]))
        assert other.state[q]["step"] == 3
