"""The profiler: what it counts, how it pairs and judges, what bad input gets, real runs."""

from __future__ import annotations

import contextlib
import itertools
import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._C._autograd import DeviceType

from maxva_kernels import FusedLaMAdam, FusedMAdam, MAdam
from maxva_kernels.profile import InputError, comparison, measure, report
from maxva_kernels.profile import __main__ as command
from maxva_kernels.profile.comparison import Case, Comparison
from maxva_kernels.profile.contenders import (
    BASELINE,
    LR,
    OTHERS,
    Contender,
    Other,
    measured_backends,
    parse,
)
from maxva_kernels.profile.foreach import ForeachMAdam
from maxva_kernels.profile.measure import (
    CpuClock,
    CudaClock,
    Rounds,
    Timing,
    activities_in,
    copied,
    make_groups,
    parameters,
    peak_extra_bytes,
    spread,
)
from maxva_kernels.profile.models import MODELS, Model, find_model, load_shapes, num_parameters
from maxva_kernels.profile.traffic import (
    DTYPE_MODES,
    adam_bytes,
    compact_word,
    least_shape,
    maxva_bytes,
    maxva_state_bytes,
)
from maxva_kernels.profile.verify import WrongResultError, check_step

CPU = torch.device("cpu")
SHAPES = [((64, 33), True), ((4000,), False), ((), False), ((7, 3, 3), True)]
TINY = Model("tiny", SHAPES)
#: Rows of whole blocks, rows with a shorter last one, and float32 states beside them.
COMPACT_SHAPES = [*SHAPES, ((24, 256), True), ((40, 130), True), ((7, 3, 500), False)]
COMPACT = Model("compact", COMPACT_SHAPES)


@pytest.fixture(autouse=True)
def _small_machine(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Yardstick and caches small enough for a test."""
    monkeypatch.setitem(measure.STREAM_NUMEL, "cpu", 1 << 16)
    for module in (measure, comparison):
        monkeypatch.setattr(module, "FLUSH_BYTES", 1 << 16)


# Models.


@pytest.mark.parametrize(
    ("model", "tensors", "numel"),
    # transformers' BertForPreTraining, GPT2LMHeadModel, LlamaForCausalLM with tied embeddings;
    # torchvision's resnet50
    [
        ("bert-base", 206, 110_106_428),
        ("bert-large", 398, 336_226_108),
        ("gpt2-xl", 580, 1_557_611_200),
        ("llama-1b", 146, 1_235_814_400),
        ("resnet-50", 161, 25_557_032),
        ("tiny-10000x64", 10_000, 640_000),
        ("tiny-200x4096-200x64", 400, 832_000),
    ],
)
def test_models_have_the_parameters_of_the_real_ones(model, tensors, numel):
    assert len(MODELS[model].shapes) == tensors
    assert MODELS[model].numel == num_parameters(MODELS[model].shapes) == numel


@pytest.mark.parametrize("model", ["bert-base", "gpt2-xl", "llama-1b"])
def test_shapes_are_those_of_transformers(model):
    transformers = pytest.importorskip("transformers")
    make = {
        "bert-base": lambda: transformers.BertForPreTraining(transformers.BertConfig()),
        "gpt2-xl": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=1600, n_layer=48, n_head=25)
        ),
        "llama-1b": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True,
            )
        ),
    }[model]  # fmt: skip
    with torch.device("meta"):
        expected = sorted(tuple(p.shape) for p in make().parameters())
    assert sorted(shape for shape, _ in MODELS[model].shapes) == expected


def test_a_model_loses_layers_until_it_fits():
    model = MODELS["gpt2-xl"]
    per_layer = model.numel - num_parameters(model.with_layers(47))
    shrunk = model.shrunk_to(model.numel - 3 * per_layer + 1)
    assert shrunk.name == "gpt2-xl[45 of 48 layers]"
    assert shrunk.numel == model.numel - 3 * per_layer
    assert model.shrunk_to(model.numel) is model
    assert model.shrunk_to(1000) is None
    assert MODELS["resnet-50"].shrunk_to(1_000_000) is None


def test_a_case_is_divided_where_memory_is_short():
    contenders = [parse(name, ["cpu"])[0] for name in (BASELINE, "FusedMAdam", "FusedLaMAdam")]
    case = Case(MODELS["bert-base"], "float32", contenders, contenders[0], CPU)
    numel = case.model.numel
    fixed = case.bytes_needed(contenders, per=0)
    # parameters and gradients 8, states 8 and 16
    assert case.bytes_needed(contenders) - fixed == numel * (8 + 8 + 16 + 16)
    assert case.fitting(case.bytes_needed(contenders)) == [contenders]
    baseline, madam, lamadam = contenders
    assert case.fitting(case.bytes_needed(contenders) - 1) == [
        [baseline, madam],
        [baseline, lamadam],
    ]
    assert case.largest_numel(fixed + 32 * 1000 + 31) == 1000


def test_shapes_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('[[3, 4], {"shape": [5], "count": 2, "decays": true}, []]')
    model = load_shapes(path)
    assert model.name == "mine"
    assert model.shapes == [((3, 4), True), ((5,), True), ((5,), True), ((), False)]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("not json", "Expecting value"),
        ("{}", "must be a list of shapes"),
        ("[]", "must be a list of shapes"),
        ("[[3, 0]]", "entry 0"),
        ("[[3], 7]", "entry 1"),
        ('[{"shape": [3], "count": true}]', "entry 0"),
        ('[{"shape": [3], "decay": true}]', "entry 0"),
        (None, "No such file"),
    ],
)
def test_malformed_shapes_files(tmp_path, content, says):
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=says):
        load_shapes(path)


def test_factories(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "import torch\n"
        "def net():\n    return torch.nn.Linear(3, 2)\n"
        "def listed():\n    return [torch.nn.Parameter(torch.zeros(4))]\n"
        "def frozen():\n    return torch.nn.Linear(3, 2).requires_grad_(False)\n"
        "def broken():\n    raise RuntimeError('no weights')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_model("my_models:net").shapes == [((2, 3), True), ((2,), False)]
    assert find_model("my_models:listed").shapes == [((4,), False)]
    for name, says in (
        ("my_models:frozen", "returns no parameters"),
        ("my_models:broken", "raises RuntimeError: no weights"),
        ("my_models:missing", "AttributeError"),
        ("no_such_module:net", "ModuleNotFoundError"),
    ):
        with pytest.raises(InputError, match=says):
            find_model(name)


# Bytes.


@pytest.mark.parametrize(
    ("dtype", "extras", "expected"),
    # docs/algorithm.md, "Memory floor"
    [
        ("float32", set(), 44),
        ("float32", {"clip"}, 48),
        ("float32", {"clip", "skip"}, 48),
        ("float32", {"amsgrad"}, 52),
        ("float32", {"stats"}, 44),
        ("float32", {"trust"}, 44 + 4 + 12),
        ("bf16-master", set(), 44),
        ("fp16-master", {"clip"}, 46),
        ("bfloat16", set(), 2 + 2 + 16 + 2 + 16),
        ("bfloat16", {"sr"}, 38),
        ("float64", set(), 88),
    ],
)
def test_bytes_of_maxva(dtype, extras, expected):
    assert maxva_bytes("madam", DTYPE_MODES[dtype], frozenset(extras)) == expected


@pytest.mark.parametrize(
    ("kind", "extras", "shape", "states", "moved"),
    # theta and g 12, then words (and with amsgrad roots) read and written, a block's scales as well
    [
        ("bfloat16", set(), (48, 256), 8, 12 + 16),
        ("int8", set(), (48, 256), 4 + 4 / 128, 12 + 8 + 8 / 128),
        ("int8", set(), (48, 130), 4 + 8 / 130, 12 + 8 + 16 / 130),
        ("int8", {"amsgrad"}, (48, 2, 128), 5 + 4 / 128, 12 + 10 + 8 / 128),
        ("bfloat16", {"amsgrad", "clip"}, (48, 256), 10, 12 + 20 + 4),
        # the pass for the norms reads theta, gradients and states
        ("int8", {"trust"}, (48, 256), 4 + 4 / 128, 12 + 8 + 8 + 4 + 12 / 128),
        # float32 states: too few elements, no rows, short rows
        ("int8", set(), (31, 128), 16, 44),
        ("int8", set(), (5000,), 16, 44),
        ("bfloat16", set(), (500, 64), 16, 44),
    ],
)
def test_bytes_of_compact_states(kind, extras, shape, states, moved):
    mode, chosen = DTYPE_MODES["float32"], frozenset({kind, *extras})
    assert maxva_state_bytes(mode, chosen, shape) == pytest.approx(states, rel=1e-12)
    assert maxva_bytes("madam", mode, chosen, shape) == pytest.approx(moved, rel=1e-12)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_state_bytes_are_those_of_an_optimizer(kind):
    (contender,) = parse("FusedMAdam+amsgrad" + f"+{kind}" * (kind != "float32"), ["cpu"])
    mode = DTYPE_MODES["bf16-master"]
    optimizer, step = contender.make(
        make_groups(COMPACT_SHAPES, "cpu", 0, mode.theta, mode.grad), mode
    )
    step()
    found = optimizer.state_memory()
    told = contender.state_bytes(mode, COMPACT_SHAPES) * COMPACT.numel
    assert told == pytest.approx(found["total"] - found["other"], rel=1e-12)


def test_the_least_shape_has_states_of_the_same_form():
    mode, extras = DTYPE_MODES["float32"], frozenset({"int8"})
    for shape in ((24, 256), (5000,), ()):
        least = least_shape(mode, extras, shape)
        assert compact_word(mode, extras, least) == compact_word(mode, extras, shape)
    assert least_shape(mode, frozenset(), (24, 256)) == (1,)


def test_bytes_are_the_mean_over_a_models_parameters():
    (contender,) = parse("FusedMAdam+bfloat16", ["cpu"])
    shapes = [((64, 128), True)] * 3 + [((4096,), False)] * 2
    assert contender.bytes_per_parameter(DTYPE_MODES["float32"], shapes) == (3 * 28 + 44) / 4


def test_lamadams_second_pass_reads_no_divisor():
    mode = DTYPE_MODES["float32"]
    assert maxva_bytes("lamadam", mode, frozenset({"trust"})) == 44 + 4 + 4


def test_bytes_of_adam():
    assert adam_bytes(DTYPE_MODES["float32"]) == 28
    assert adam_bytes(DTYPE_MODES["float32"], frozenset({"clip"})) == 40
    assert adam_bytes(DTYPE_MODES["float32"], frozenset({"amsgrad"})) == 36
    assert adam_bytes(DTYPE_MODES["bfloat16"]) == 14
    assert adam_bytes(DTYPE_MODES["bf16-master"], state=4) == 4 + 2 + 16 + 6
    for name in ("bnb-AdamW8bit", "torchao-AdamW8bit"):
        (contender,) = parse(name, [])
        # two states of a byte, and of a float32 per block of 256
        states = 2 * (1 + 4 / 256)
        assert contender.bytes_per_parameter(DTYPE_MODES["float32"], SHAPES) == 12 + 2 * states
        assert contender.state_bytes(DTYPE_MODES["float32"], SHAPES) == states


def test_others_get_float32_parameters_where_they_keep_no_master():
    mode = DTYPE_MODES["bf16-master"]
    assert parse(BASELINE, [])[0].dtypes(mode) == DTYPE_MODES["float32"]
    assert parse(BASELINE, [])[0].bytes_per_parameter(mode, SHAPES) == 28
    assert parse("te-FusedAdam", [])[0].dtypes(mode) == mode


# Contenders.


def test_the_foreach_baseline_is_madam():
    groups = make_groups(SHAPES)
    other_groups = [
        {**group, "params": [torch.nn.Parameter(p.detach().clone()) for p in group["params"]]}
        for group in groups
    ]
    baseline, reference = ForeachMAdam(copied(groups)), MAdam(copied(other_groups))
    for t in range(5):
        generator = torch.Generator().manual_seed(t)
        for p, q in zip(parameters(groups), parameters(other_groups), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        baseline.step()
        reference.step()
    for p, q in zip(parameters(groups), parameters(other_groups), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-6)


def test_names_stand_for_one_contender_per_backend():
    assert [c.label for c in parse("FusedMAdam+stats+clip", ["cuda", "triton"])] == [
        "FusedMAdam+clip+stats (cuda)",
        "FusedMAdam+clip+stats (triton)",
    ]
    assert parse("AdamW-fused+clip", ["cpu"]) == [Contender("AdamW-fused", frozenset({"clip"}))]


def test_extras_are_options_of_the_optimizer():
    groups = make_groups(SHAPES, "cpu", 0, torch.bfloat16, torch.bfloat16)
    (contender,) = parse("FusedLaMAdam+clip+skip+stats+sr+amsgrad+trust+int8", ["eager"])
    optimizer, _ = contender.make(groups, DTYPE_MODES["bfloat16"])
    assert type(optimizer) is FusedLaMAdam
    (first, *_) = optimizer.param_groups
    for option in ("skip_nonfinite", "collect_stats", "stochastic_rounding", "amsgrad"):
        assert first[option] is True
    assert first["trust_ratio"] is True
    assert first["state_dtype"] == "int8"
    assert first["max_grad_norm"] > 0
    assert first["lr"] == LR
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.01, 0.0}


def test_clipping_in_front_of_another_optimizer_leaves_shared_gradients():
    groups = make_groups(SHAPES)
    before = [p.grad.clone() for p in parameters(groups)]
    _, step = parse("AdamW-fused+clip", [])[0].make(groups, DTYPE_MODES["float32"])
    step()
    assert all(map(torch.equal, before, (p.grad for p in parameters(groups))))


def test_an_lr_that_is_a_tensor_is_filled(monkeypatch):
    lr = torch.tensor(0.5)
    other = Other("torch", lambda groups, mode, extras: torch.optim.AdamW(groups, lr=lr))
    monkeypatch.setitem(OTHERS, "AdamW-foreach", other)
    optimizer, _ = parse("AdamW-foreach", [])[0].make(make_groups(SHAPES), DTYPE_MODES["float32"])
    assert {group["lr"] for group in optimizer.param_groups} == {lr}
    assert lr == torch.tensor(LR)


def test_why_a_contender_is_not_there():
    mode = DTYPE_MODES["float32"]
    assert "bfloat16" in parse("FusedMAdam+sr", ["cpu"])[0].why_not("cpu", mode)
    assert "float32" in parse("MAdam-foreach", [])[0].why_not("cpu", DTYPE_MODES["bfloat16"])
    (compact,) = parse("FusedMAdam+int8", ["cpu"])
    assert compact.why_not("cpu", mode) is None
    assert "float64 states" in compact.why_not("cpu", DTYPE_MODES["float64"])
    assert parse("apex-FusedAdam", [])[0].why_not("cpu", mode) == "it is for cuda"
    assert parse(BASELINE, [])[0].why_not("cpu", mode) is None


def test_a_package_that_does_not_load_is_named_with_its_error(tmp_path, monkeypatch):
    (tmp_path / "bitsandbytes.py").write_text("raise OSError('libcudart.so: not found')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    assert OTHERS["bnb-AdamW"].why_not("cuda") == "OSError: libcudart.so: not found"


def test_the_interpreter_is_not_measured():
    assert "triton" not in measured_backends("cpu")
    assert measured_backends("cpu") == ["cpu", "eager"]


# Clocks and rounds.


class FakeTime:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def pass_(self, seconds: float) -> None:
        self.seconds += seconds


def test_cpu_clock_times_the_step_and_not_the_flush():
    now = FakeTime()
    clock = CpuClock(lambda: now.pass_(100), now)
    assert clock.step(lambda: now.pass_(3)) == {"step": 3}
    assert clock.stream(lambda: now.pass_(2)) == 2


def test_cpu_kernel_time_is_that_inside_of_operators():
    ticks = iter(range(1000))
    a = torch.zeros(3)

    def step() -> None:
        next(ticks)  # the host's work
        a.add_(1)
        next(ticks)
        a.mul_(2)

    method, timed = CpuClock(now=lambda: float(next(ticks))).kernel(step)
    assert method == "operators"
    assert timed() == 2
    assert a.tolist() == [2, 2, 2]


class FakeCuda:
    """torch.cuda with a device that works off a queue: seconds a call, host time of its own."""

    def __init__(self, now: FakeTime, captures: bool = True) -> None:
        self.now = now
        self.device = 0.0
        self.captures = captures
        self.capturing = False
        self.graph_seconds = 0.0

    def launch(self, host: float, device: float) -> None:
        if self.capturing:
            self.graph_seconds += device
            return
        self.now.pass_(host)
        self.device = max(self.device, self.now()) + device

    def synchronize(self) -> None:
        self.now.seconds = max(self.now(), self.device)

    def current_stream(self) -> SimpleNamespace:
        return SimpleNamespace(wait_stream=lambda other: None)

    Stream = current_stream

    def stream(self, stream: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def CUDAGraph(self) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(replay=lambda: self.launch(0.001, self.graph_seconds))

    @contextlib.contextmanager
    def graph(self, graph: object):
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.capturing = True
        yield
        self.capturing = False

    def Event(self, enable_timing: bool) -> SimpleNamespace:  # noqa: N802
        event = SimpleNamespace(at=0.0)
        event.record = lambda: setattr(event, "at", max(self.device, self.now()))
        event.elapsed_time = lambda other: 1e3 * (other.at - event.at)
        return event


def test_cuda_clock_tells_step_host_and_kernel_apart():
    now = FakeTime()
    cuda = FakeCuda(now)
    clock = CudaClock(lambda: cuda.launch(0.001, 50), now, cuda)

    def step() -> None:
        for _ in range(3):
            cuda.launch(host=0.5, device=2)

    found = clock.step(step)
    assert found == {"step": pytest.approx(6.5), "host": pytest.approx(1.5)}
    method, timed = clock.kernel(step)
    assert method == "graph replay"
    assert timed() == pytest.approx(6)
    assert clock.stream(lambda: cuda.launch(0.1, 4)) == pytest.approx(4)


def test_what_cannot_be_captured_is_timed_by_the_tracer(monkeypatch):
    now = FakeTime()
    cuda = FakeCuda(now, captures=False)
    kernels = [SimpleNamespace(device_time=1500), SimpleNamespace(device_time=500)]
    monkeypatch.setattr(measure, "device_activities", lambda step: kernels)
    method, timed = CudaClock(now=now, cuda=cuda).kernel(lambda: cuda.launch(1, 1))
    assert method == "kernel events"
    assert timed() == pytest.approx(2e-3)
    monkeypatch.setattr(measure, "device_activities", lambda step: [])
    assert CudaClock(now=now, cuda=cuda).kernel(lambda: cuda.launch(1, 1)) is None


def test_activities_are_work_of_the_device():
    kernel = SimpleNamespace(device_type=DeviceType.CUDA)
    annotation = SimpleNamespace(device_type=DeviceType.CUDA, is_user_annotation=True)
    operator = SimpleNamespace(device_type=DeviceType.CPU)
    assert activities_in([operator, kernel, annotation, kernel]) == [kernel, kernel]


def test_peak_extra_memory_is_the_most_held_at_once():
    def step() -> None:
        for _ in range(3):
            a = torch.zeros(1000)
            a = a.clone()
            del a

    assert peak_extra_bytes(step, CPU) == 8000
    a = torch.zeros(1000)
    assert peak_extra_bytes(lambda: a.neg_(), CPU) == 0


def test_ratios_are_medians_of_pairs():
    ours, theirs = Timing([3.0, 30.0, 9.0]), Timing([2.0, 10.0, 9.0])
    assert ours.median == 9.0
    assert ours.ratios_to(theirs) == [1.5, 3.0, 1.0]
    assert ours.ratio_to(theirs) == 1.5


def test_spread_is_a_standard_deviation_that_ignores_outliers():
    values = torch.randn(4001, generator=torch.Generator().manual_seed(0)).double() * 3 + 7
    assert spread(values.tolist()) == pytest.approx(3, rel=0.05)
    assert spread([*values.tolist(), 1e9]) == pytest.approx(3, rel=0.05)


def test_every_contender_runs_once_a_round_and_none_is_always_first():
    order: list[str] = []

    def contender(name: str):
        return lambda: order.append(name) or {"step": 1.0}

    rounds = Rounds({name: contender(name) for name in "ab"}, lambda: order.append("|"))
    rounds()
    rounds.forget()
    for _ in range(3):
        rounds()
    assert "".join(order) == "|ab|ba|ab|ba"
    assert {name: len(found["step"].seconds) for name, found in rounds.timings().items()} == {
        "a": 3,
        "b": 3,
    }


# Verification.


@pytest.mark.parametrize("dtype", DTYPE_MODES)
@pytest.mark.parametrize("name", ["FusedMAdam", "FusedLaMAdam+clip+skip+amsgrad+trust+stats"])
def test_right_results_pass(dtype, name):
    (contender,) = parse(name, ["cpu"])
    case = Case(TINY, dtype, [contender], contender, CPU)
    assert not Comparison(case).problems.wrong


def test_stochastic_rounding_passes():
    (contender,) = parse("FusedMAdam+sr", ["cpu"])
    compared = Comparison(Case(TINY, "bfloat16", [contender], contender, CPU))
    assert compared.problems.wrong == {}
    assert list(compared.steps) == ["FusedMAdam+sr (cpu)"]


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "maxva_avg", "maxva_weight", None])
@pytest.mark.parametrize("dtype", ["float32", "bf16-master"])
def test_one_wrong_element_is_found(key, dtype):
    (contender,) = parse("FusedMAdam", ["cpu"])
    mode = DTYPE_MODES[dtype]
    groups = make_groups(SHAPES, "cpu", 0, mode.theta, mode.grad)
    optimizer, right_step = contender.make(groups, mode)
    p = parameters(groups)[-2]
    state = optimizer.state[p]

    def wrong_step() -> None:
        right_step()
        changed = state.get("master_param", p) if key is None else state[key]
        with torch.no_grad():
            # 1 % of an update, or of the state itself
            changed.view(-1)[-1] += 0.01 * (LR if key is None else changed.view(-1)[-1])

    def negate() -> None:
        for q in parameters(groups):
            q.grad.neg_()

    with pytest.raises(WrongResultError, match=key or "the parameter"):
        check_step(contender, optimizer, wrong_step, negate, mode)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("dtype", [name for name in DTYPE_MODES if name != "float64"])
@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
@pytest.mark.parametrize("name", ["FusedMAdam", "FusedLaMAdam+clip+skip+amsgrad+trust+stats"])
def test_right_compact_states_pass(name, kind, dtype, backend):
    (contender,) = parse(f"{name}+{kind}", [backend])
    compared = Comparison(Case(COMPACT, dtype, [contender], contender, CPU))
    assert compared.problems.wrong == {}
    assert list(compared.steps) == [contender.label]


SLOTS = {
    "int8": ["r", "mean", "sd", "w", "root", "the parameter"],
    "bfloat16": ["m", "mean", "var", "w", "vmax", "the parameter"],
}


@pytest.mark.parametrize("name", ["FusedMAdam", "FusedLaMAdam"])
@pytest.mark.parametrize(("kind", "slot"), [(kind, slot) for kind in SLOTS for slot in SLOTS[kind]])
@pytest.mark.parametrize("shape", [(24, 256), (40, 130), (300, 300)])
def test_one_wrong_code_is_found(shape, slot, kind, name):
    """Two codes beside what the kernel has written: at most one is the true value's neighbour."""
    (contender,) = parse(f"{name}+amsgrad+{kind}", ["cpu"])
    mode = DTYPE_MODES["float32"]
    groups = make_groups([(shape, True)])
    optimizer, right_step = contender.make(groups, mode)
    (p,) = parameters(groups)
    state = optimizer.state[p]
    bits = 8 if kind == "int8" else 16

    def wrong_step() -> None:
        right_step()
        if slot == "the parameter":
            with torch.no_grad():
                p.view(-1)[-1] += 0.01 * LR
            return
        place = SLOTS[kind].index(slot)
        in_word = place < 4
        key = "maxva_packed" if in_word else "maxva_packed_max"
        codes = state[key].view(torch.uint8 if kind == "int8" else torch.int16)
        per_element = 4 if in_word else 1
        assert state[key].itemsize * 8 == bits * per_element
        code = codes.view(-1)[-per_element:][place % 4 : place % 4 + 1]
        code += 2 if int(code) & 0x7F < 0x7D else -2

    def negate() -> None:
        p.grad.neg_()

    with pytest.raises(WrongResultError, match=f"computes {slot} of"):
        check_step(contender, optimizer, wrong_step, negate, mode)


@pytest.mark.parametrize("slot", ["r", "mean", "sd", "root"])
def test_a_wrong_scale_is_found_where_its_codes_are_right(slot):
    """Every second code of a doubled scale is one of those it had, eight (sixteen) codes below."""
    (contender,) = parse("FusedMAdam+amsgrad+int8", ["cpu"])
    mode = DTYPE_MODES["float32"]
    groups = make_groups([((24, 256), True)])
    optimizer, right_step = contender.make(groups, mode)
    (p,) = parameters(groups)

    def wrong_step() -> None:
        right_step()
        exponents = optimizer.state[p]["maxva_scale"].view(torch.uint8).view(-1, 4)
        exponents[-1, ["r", "mean", "sd", "root"].index(slot)] += 1

    with pytest.raises(WrongResultError, match=f"the scale of {slot} of"):
        check_step(contender, optimizer, wrong_step, lambda: p.grad.neg_(), mode)


def test_wrong_results_are_reported_and_not_timed(monkeypatch, capsys, shapes_file):
    right = FusedMAdam._step

    def wrong(self: FusedMAdam) -> None:
        right(self)
        for group in self.param_groups:
            torch._foreach_mul_([p.data for p in group["params"]], 1.001)

    monkeypatch.setattr(FusedMAdam, "_step", wrong)
    status, output, errors = run(
        capsys, "--shapes", shapes_file, "--optimizers", "FusedMAdam", "--rounds", "1"
    )
    assert status == 1
    assert "WRONG, not timed: shapes in float32: FusedMAdam (cpu) computes the parameter" in errors
    assert "AdamW-fused" in output
    assert "FusedMAdam" not in output


# Reports.


def row(**changes: object) -> report.Row:
    return {
        "model": "bert-base", "parameters": 1000, "tensors": 3, "dtype": "float32",
        "optimizer": "FusedMAdam", "backend": "cpu", "threads": 2, "rounds": 9,
        "step_ms": 12.345, "kernel_ms": 12.0, "bytes_per_parameter": 44, "gb_per_s": 51.27,
        "bandwidth_gb_per_s": 54.9, "share_of_bandwidth": 0.934, "peak_extra_bytes": 4096,
        "launches": None, "kernel_method": "operators", "host_us": 345.6,
        "baseline": BASELINE, "ratio": 1.5149, "ratio_spread": 0.015,
        "kernel_ratio": 1.5, "kernel_ratio_spread": 0.015, **changes,
    }  # fmt: skip


ABOUT = {"device": "a processor", "torch": "2.x", "command": "maxva-profile"}


def test_table():
    text = report.table([row()], ABOUT)
    assert text.startswith("device a processor, torch 2.x\n\n")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    # launches are empty in every row and left out
    assert cells[2] == [
        "model", "dtype", "threads", "optimizer", "step ms", "kernel ms", "host us", "B/param",
        "GB/s", "of bandwidth", "extra memory", "ratio", "kernel ratio", "to",
    ]  # fmt: skip
    assert cells[-1] == [
        "bert-base", "float32", "2", "FusedMAdam (cpu)", "12.35", "12.00", "346", "44",
        "51.3", "93%", "4.0 KiB", "1.515", "1.500", BASELINE,
    ]  # fmt: skip


def test_plots(tmp_path):
    baseline = row(optimizer=BASELINE, backend=None, bytes_per_parameter=28, ratio=1.0)
    unknown = row(optimizer="AdamW-foreach", backend=None, bytes_per_parameter=None, gb_per_s=None)
    for path in report.write_plots([baseline, row(), unknown], ABOUT, tmp_path):
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ({}, {}, ["same", "same"]),
        # the margin: twice sqrt(2) times the spread of 1 %
        ({}, {"ratio": 1.5149 * 1.027}, ["same", "same"]),
        ({}, {"ratio": 1.5149 * 1.03}, ["regression", "same"]),
        ({}, {"kernel_ratio": 1.5 * 1.03}, ["same", "regression"]),
        ({}, {"ratio": 1.5149 * 0.96}, ["improvement", "same"]),
        ({}, {"ratio": 1.5149 * 1.03, "ratio_spread": 0.1}, ["same", "same"]),
        # never below 2 %
        ({"ratio_spread": 0.0}, {"ratio": 1.54, "ratio_spread": 0.0}, ["same", "same"]),
        ({"kernel_ratio": None}, {}, ["same"]),
        ({"backend": "triton"}, {}, []),
        ({"threads": 1}, {}, []),
    ],
)
def test_verdicts(before, now, words):
    verdicts = report.compare([row(**before)], [row(**now)])
    assert [verdict.word for verdict in verdicts] == words


def test_a_verdict_in_words():
    (verdict, _) = report.compare([row()], [row(ratio=1.6)])
    assert str(verdict) == (
        "regression: bert-base, float32, 2 threads, FusedMAdam (cpu): ratio 1.515 -> 1.600 "
        "(+5.6%, noise 2.7%)"
    )


# The program.


@pytest.fixture
def shapes_file(tmp_path: Path) -> str:
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps([[33, 20], {"shape": [1000], "count": 3}]))
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = command.main([*arguments, "--device", "cpu"])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_run_reports_everything(tmp_path, capsys, shapes_file):
    new, table, trace = (tmp_path / name for name in ("new.json", "table.md", "trace.json"))
    status, output, _ = run(
        capsys, "--shapes", shapes_file, "--rounds", "3", "--dtypes", "float32,bf16-master",
        "--optimizers", "FusedMAdam,FusedMAdam+stats,AdamW-foreach", "--clip", "--threads", "1",
        "--json", str(new), "--markdown", str(table), "--plots", str(tmp_path / "plots"),
        "--trace", str(trace),
    )  # fmt: skip
    assert status == 0
    written = json.loads(new.read_text())
    assert written["schema"] == report.SCHEMA
    environment = written["environment"]
    assert {"device", "cores", "torch", "python", "commit", "date", "maxva_isa"} <= set(environment)
    rows = written["rows"]
    plain = [BASELINE, "FusedMAdam", "FusedMAdam+stats", "AdamW-foreach"]
    clipping = [
        "AdamW-fused+clip",
        "FusedMAdam+clip",
        "FusedMAdam+clip+stats",
        "AdamW-foreach+clip",
    ]
    assert [(r["dtype"], r["optimizer"]) for r in rows] == [
        (dtype, name) for dtype in ("float32", "bf16-master") for name in (*plain, *clipping)
    ]
    assert all(set(row()) == set(r) for r in rows)
    assert {r["parameters"] for r in rows} == {3660}
    for r in rows:
        assert r["rounds"] == 3
        assert r["kernel_ms"] > 0
        assert r["step_ms"] > 0
        assert r["host_us"] >= 0
        assert r["ratio"] > 0
        assert r["launches"] is None
        if r["bytes_per_parameter"]:
            rate = r["bytes_per_parameter"] * 3660 / r["kernel_ms"] / 1e6
            assert r["gb_per_s"] == pytest.approx(rate)
            assert r["share_of_bandwidth"] == pytest.approx(rate / r["bandwidth_gb_per_s"])
    assert [r["ratio"] for r in rows if r["optimizer"] == r["baseline"]] == [1.0] * 4
    assert table.read_text().strip() == output.strip()
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"bars.png", "roofline.png"}
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"AdamW-fused", "FusedMAdam (cpu)", "maxva::update_"} <= names


@pytest.mark.parametrize(
    ("factor", "noise", "status", "word"), [(1e-3, 0.0, 1, "regression"), (1.0, 1e3, 0, "same")]
)
def test_comparing_with_an_earlier_run(tmp_path, capsys, shapes_file, factor, noise, status, word):
    old = tmp_path / "old.json"
    arguments = ("--shapes", shapes_file, "--rounds", "3", "--optimizers", "FusedMAdam")
    assert run(capsys, *arguments, "--json", str(old))[0] == 0
    written = json.loads(old.read_text())
    for each in written["rows"]:
        for figure in ("ratio", "kernel_ratio"):
            each[figure] *= factor
            each[f"{figure}_spread"] = noise * each[figure]
    old.write_text(json.dumps(written))
    found, output, _ = run(capsys, *arguments, "--compare", str(old))
    words = [line.split(":")[0] for line in output.splitlines() if "->" in line]
    assert words == [word, word]
    assert found == status


BAD = {
    "models": (["--models", "bert-huge"], "model 'bert-huge' is not known; there are bert-base, "),
    "dtypes": (["--dtypes", "int8"], "dtype 'int8' is not known; there are float32, "),
    "backends": (["--backends", "tpu"], "backend 'tpu' is not known; there are cuda, triton, cpu"),
    "backend": (["--backends", "cuda"], "backend 'cuda' is not available: "),
    "optimizers": (["--optimizers", "Lion"], "optimizer 'Lion' is not known; there are FusedMAdam"),
    "extra": (["--optimizers", "FusedMAdam+fast"], "'+fast' is not known; there are +clip, "),
    "two state dtypes": (["--optimizers", "FusedMAdam+int8+bfloat16"], "states have one dtype, "),
    "of others": (["--optimizers", "AdamW-fused+sr"], "there are +clip, +amsgrad"),
    "absent": (["--optimizers", "apex-FusedAdam"], "'apex-FusedAdam' is not available: it is for"),
    "baseline": (["--baseline", "SGD"], "optimizer 'SGD' is not known"),
    "ncu": (["--ncu", "--models", "bert-huge"], "model 'bert-huge' is not known"),
    "ncu's optimizer": (["--ncu", "--optimizers", "Lion"], "optimizer 'Lion' is not known"),
    "no factory": (["--model", "bert-base"], "--model must be MODULE:FACTORY"),
    "device": (["--device", "abacus"], "--device must be cpu, cuda or cuda:N"),
    "rounds": (["--rounds", "0"], "must be a number above 0"),
    "seconds": (["--seconds", "fast"], "must be a number above 0"),
    "both": (["--rounds", "1", "--seconds", "1"], "not allowed with"),
    "threads": (["--threads", "1,none"], "must be a number above 0"),
    "nothing": (["--dtypes", ","], "names nothing"),
    "option": (["--model-list"], "unrecognized arguments"),
    "output": (["--json", "{tmp}/file/report.json"], "--json "),
    "folder": (["--json", "{tmp}"], "Is a directory"),
    "plots": (["--plots", "{tmp}/file"], "--plots "),
    "compare": (["--compare", "{tmp}/none.json"], "No such file"),
    "schema": (["--compare", "{tmp}/file"], "is no report"),
    "other device": (["--compare", "{tmp}/other.json"], "it is of another device (an abacus)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(case, tmp_path, capsys):
    (tmp_path / "file").write_text("{}")
    other = report.document([row()], {**ABOUT, "device": "an abacus"}, {})
    (tmp_path / "other.json").write_text(json.dumps(other))
    arguments, says = BAD[case]
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    if "--device" not in arguments:
        arguments += ["--device", "cpu"]
    assert command.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("maxva-profile: error: ")
    assert says in captured.err
    assert captured.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other.json"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(capsys):
    assert command.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err == (
        "maxva-profile: error: --device cuda: torch sees no CUDA device\n"
    )


def test_a_comparison_without_common_rows(tmp_path, capsys, shapes_file):
    old = tmp_path / "old.json"
    about = measure.environment(CPU)
    old.write_text(json.dumps(report.document([row()], about, {})))
    arguments = ("--shapes", shapes_file, "--rounds", "1", "--optimizers", "FusedMAdam")
    status, _, errors = run(capsys, *arguments, "--compare", str(old))
    assert status == 2
    assert "it has none of these rows" in errors


def test_models_that_do_not_fit_are_shrunk_or_skipped(capsys, monkeypatch):
    monkeypatch.setattr(command, "free_bytes", lambda device: 3 << 20)
    small = Model("stack", [((100, 100), True)] * 20, 20, lambda n: [((100, 100), True)] * n)
    monkeypatch.setitem(MODELS, "stack", small)
    arguments = ("--optimizers", "FusedMAdam", "--rounds", "1", "--models", "stack,resnet-50")
    status, output, errors = run(capsys, *arguments)
    assert status == 0
    assert "stack in float32 does not fit in 0.0 GB: measuring stack[" in errors
    assert "skipped resnet-50 in float32: needs " in errors
    assert "stack[" in output
    assert "resnet" not in output


def test_a_contender_that_fails_is_named_and_others_go_on(capsys, monkeypatch, shapes_file):
    def fails(*arguments: object) -> None:
        raise RuntimeError("no kernel image")

    broken = OTHERS["AdamW-foreach"].__class__("torch", fails)
    monkeypatch.setitem(OTHERS, "AdamW-foreach", broken)
    status, output, errors = run(
        capsys, "--shapes", shapes_file, "--rounds", "1", "--optimizers", "FusedMAdam,AdamW-foreach"
    )
    assert status == 0
    assert (
        "not measured: AdamW-foreach on shapes in float32: RuntimeError: no kernel image" in errors
    )
    assert "FusedMAdam" in output


def test_ncu_prints_a_command_that_this_program_takes(capsys):
    status, output, _ = run(
        capsys, "--ncu", "--models", "gpt2-xl", "--optimizers", "AdamW-fused,FusedLaMAdam+trust",
        "--backends", "triton", "--dtypes", "bf16-master",
    )  # fmt: skip
    assert status == 0
    words = shlex.split(output)
    assert words[:2] == ["ncu", "--set"]
    options = dict(itertools.pairwise(words))
    assert options["--kernel-name"] == "update_kernel"
    # three checked steps of two launches each, then both launches of one
    assert (options["--launch-skip"], options["--launch-count"]) == ("6", "2")
    parsed = command._parser().parse_args(words[words.index("maxva_kernels.profile") + 1 :])
    assert parsed.models == ["gpt2-xl"]
    assert parsed.optimizers == ["FusedLaMAdam+trust"]
    assert parsed.backends == ["triton"]
    assert parsed.dtypes == ["bf16-master"]
    assert parsed.rounds == 1


def test_the_kernels_have_the_name_that_ncu_is_told():
    root = Path(__file__).parents[1]
    assert "    update_kernel(" in (root / "csrc" / "update_kernel.cuh").read_text()
    assert "def update_kernel(" in (root / "triton_kernels" / "multi_tensor_apply.py").read_text()


def test_list(capsys):
    status, output, _ = run(capsys, "--list")
    assert status == 0
    for name in (*MODELS, *DTYPE_MODES, *OTHERS, "FusedMAdam", "cpu"):
        assert f"  {name}" in output


def test_the_package_does_not_load_its_profiler():
    code = (
        "import sys, maxva_kernels; "
        "sys.exit(any('maxva_kernels.profile' in m or m == 'matplotlib' for m in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_python_m_runs_it():
    done = subprocess.run(
        [sys.executable, "-m", "maxva_kernels.profile", "--models", "none"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("maxva-profile: error: model 'none' is not known")
