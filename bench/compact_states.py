"""What compact states cost in accuracy: writes docs/compact_states.md.

    python bench/compact_states.py [--quick] [--only NAMES] [--write docs/compact_states.md]

Five studies: the rounding of one step, by slot; the noisy quadratic model of the paper's Sec. 4.2;
a small character transformer; the time of a step; and the pretraining of examples/bert_pretraining,
two runs side by side, which may be stopped: the same command goes on. bitsandbytes' 8-bit AdamW
takes part where it is installed, torchao's with --torchao (its step is compiled first), not in the
pretraining. Some minutes on a core, and a quarter of an hour or more of pretraining on two.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import math
import platform
import pydoc_data.topics
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maxva_kernels import FusedLaMAdam, FusedMAdam
from maxva_kernels.compact import WORD_DTYPE, Moments, Packed, fold, pack, unpack
from maxva_kernels.rounding import random_words

SEEDS = (0, 1, 2)
ADAMW = "torch AdamW float32"
Make = Callable[..., torch.optim.Optimizer]


@dataclass(frozen=True)
class Contestant:
    """An optimizer, and the learning rate it is given on the transformer."""

    name: str
    make: Make
    lr: float


def contestants(torchao: bool) -> list[Contestant]:
    """Ours in every state_dtype, torch's AdamW, and the 8-bit peers that are installed."""
    ours = [
        Contestant(f"{cls.__name__} {kind}", _ours(cls, kind), 3e-3)
        for cls in (FusedMAdam, FusedLaMAdam)
        for kind in ("float32", "bfloat16", "int8")
    ]
    found = [*ours, Contestant(ADAMW, _fused_adamw, 1e-3)]
    peers = ["bitsandbytes", *(["torchao"] if torchao else [])]
    for label in peers:
        try:
            peer = importlib.import_module(f"{label}.optim")
        except ImportError as error:
            print(f"{label} does not take part: {error}", file=sys.stderr)
        else:
            found.append(Contestant(f"{label} AdamW 8-bit", peer.AdamW8bit, 1e-3))
    return found


def _fused_adamw(params: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, fused=True, **options)


def _ours(cls: Any, kind: str) -> Make:
    return lambda params, **options: cls(params, state_dtype=kind, **options)


# --- the rounding of one step --------------------------------------------------------------------


def rounding_errors() -> Iterator[tuple[str, list[float]]]:
    """Per kind: root mean square of relative errors of r, mean, sd, x and of the whole update.

    States as after 300 gradients whose scales spread over two decades inside a block.
    """
    generator = torch.Generator().manual_seed(0)
    shape = 256, 1024
    scale = 10 ** (2 * torch.rand(shape, generator=generator) - 2)
    drift = 0.3 * torch.randn(shape, generator=generator)
    p = nn.Parameter(torch.zeros(shape))
    opt = FusedMAdam([p], lr=0.0)
    for _ in range(300):
        p.grad = scale * (drift + torch.randn(shape, generator=generator))
        opt.step()
    state = opt.state[p]
    w = state["maxva_weight"]
    mean = state["maxva_avg"] / w
    var = (state["exp_avg_sq"] / w - mean.square()).clamp(min=0)
    true = Moments(state["exp_avg"], mean, var, w)
    words = random_words(p.numel(), torch.tensor(1), (0, 0, 0, p.numel(), p.numel(), 0))
    for kind, dtype in WORD_DTYPE.items():
        stored: Packed = pack(true, "madam", torch.zeros(shape, dtype=dtype), words)
        found = unpack(stored, "madam")
        pairs = [
            (_r(found), _r(true)), (found.mean, mean), (found.var.sqrt(), var.sqrt()),
            (_update(found), _update(true)),
        ]  # fmt: skip
        errors = [float((a - b).norm() / b.norm()) for a, b in pairs]
        of_w = float((found.w - w).norm() / fold(w).norm())  # x changes its sign at w = 1/2
        yield kind, [*errors[:3], of_w, errors[3]]


def _r(moments: Moments) -> Tensor:
    return moments.m / (moments.mean.abs() + moments.var.sqrt())


def _update(moments: Moments) -> Tensor:
    return moments.m / (moments.mean.square() + moments.var).sqrt()


# --- the noisy quadratic model -------------------------------------------------------------------


def quadratic(contestant: Contestant, lr: float, seed: int, steps: int, trials: int) -> float:
    """Mean loss after the steps: curvatures 1 and 20, noise 0.2; a row per coordinate."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.tensor([[1.0], [20.0]])
    assert 2 * trials >= 4096, "smaller parameters keep float32 states, here and in the peers"
    theta = nn.Parameter(torch.randn(2, trials, generator=generator))
    betas = (0.9, 0.99)
    opt = contestant.make([theta], lr=lr, betas=betas, eps=1e-10, weight_decay=0.0)
    for _ in range(steps):
        noise = 0.2 * torch.randn(2, trials, generator=generator)
        theta.grad = h * (theta.detach() - noise)
        opt.step()
    return float(0.5 * (h * theta.detach().square()).sum(0).mean())


# --- a character transformer ---------------------------------------------------------------------


class Transformer(nn.Module):
    """Two layers of width 128 that predict the next of 64 characters."""

    def __init__(self, vocabulary: int, width: int = 128, context: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.place = nn.Parameter(torch.randn(context, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)
        mask = nn.Transformer.generate_square_subsequent_mask(context)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layers(self.embedding(x) + self.place, mask=self.mask, is_causal=True)
        return self.head(hidden)


def corpus() -> tuple[Tensor, int]:
    """Python's own reference manual, which every installation has, as character codes."""
    text = "".join(pydoc_data.topics.topics.values())
    characters = sorted(set(text))
    index = {c: i for i, c in enumerate(characters)}
    return torch.tensor([index[c] for c in text]), len(characters)


def transformer(contestant: Contestant, seed: int, steps: int) -> tuple[float, float]:
    """Mean loss of the last tenth of the steps, and state bytes per parameter."""
    data, vocabulary = corpus()
    torch.manual_seed(seed)
    net = Transformer(vocabulary)
    opt = contestant.make(net.parameters(), lr=contestant.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda t: min((t + 1) / 30, 1.0) * 0.5 * (1 + math.cos(math.pi * t / steps))
    )
    generator = torch.Generator().manual_seed(1000 + seed)
    losses = []
    for _ in range(steps):
        begin = torch.randint(0, len(data) - 65, (16,), generator=generator)
        batch = data[begin[:, None] + torch.arange(65)]
        loss = nn.functional.cross_entropy(net(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        losses.append(loss.item())
    tail = losses[-max(steps // 10, 1) :]
    size = sum(p.numel() for p in net.parameters())
    return sum(tail) / len(tail), _state_bytes(opt) / size


def _state_bytes(opt: Any) -> float:
    if hasattr(opt, "state_memory"):
        found = opt.state_memory()
        return float(found["states"] + found["scales"])
    return float(sum(_bytes(v) for state in opt.state.values() for v in state.values()))


def _bytes(value: Any) -> int:
    """Of torchao's subclasses the tensors inside; not step counters and shared code tables."""
    if not isinstance(value, Tensor) or value.dim() == 0 or value.numel() == 256:
        return 0
    if hasattr(value, "__tensor_flatten__"):
        return sum(_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.numel() * value.element_size()


# --- the time of a step --------------------------------------------------------------------------


def times(found: list[Contestant], tensors: int, rounds: int) -> dict[str, float]:
    """Median over rounds of each one's step time by that of AdamW in the same round.

    Gradients change their sign from round to round.
    """
    optimizers = {}
    for contestant in found:
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(768, 768, generator=generator)) for _ in range(tensors)]
        for p in params:
            p.grad = 0.01 * torch.randn(p.shape, generator=generator)
        optimizers[contestant.name] = contestant.make(params, lr=1e-4, weight_decay=0.01)
    ratios: dict[str, list[float]] = {name: [] for name in optimizers}
    for turn in range(rounds + 2):
        taken = {}
        for name, opt in optimizers.items():
            for p in opt.param_groups[0]["params"]:
                p.grad.neg_()
            begin = time.perf_counter()
            opt.step()
            taken[name] = time.perf_counter() - begin
        if turn >= 2:  # the first ones make states
            for name in optimizers:
                ratios[name].append(taken[name] / taken[ADAMW])
    return {name: statistics.median(values) for name, values in ratios.items()}


# --- pretraining ---------------------------------------------------------------------------------

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "bert_pretraining"
#: The best of docs/comparison.md's grid, for MAdam and for AdamW.
PRETRAINING_LR = 2e-3
#: By name what the example is told, and how its curves look, which lie upon each other.
PRETRAINED = {
    "MAdam float32": ("madam", "float32", {"color": "tab:blue"}),
    "MAdam bfloat16": ("madam", "bfloat16", {"color": "tab:green", "ls": "--"}),
    "MAdam int8": ("madam", "int8", {"color": "tab:red", "ls": ":"}),
    "AdamW float32": ("adamw", "float32", {"color": "tab:gray"}),
    "AdamW 8-bit (bitsandbytes)": ("adamw", "int8", {"color": "tab:orange", "ls": "--"}),
}


def pretraining(
    compare: Any, comparison: Any, out: Path, quick: bool, overwrite: bool, images: Path
) -> str:
    """The section of the pretraining study; its figure goes into `images`.

    Args:
        compare: the example's module, which makes runs and keeps what they end with in `out`.
        comparison: the example's module that has figures of runs.
        out: the study's folder.
        quick: six steps a run.
        overwrite: whether to delete the study that is in `out`.
        images: where the figure is written.
    """
    chosen = dict(PRETRAINED)
    if importlib.util.find_spec("bitsandbytes") is None:
        _say("bitsandbytes does not take part: it is not installed")
        chosen = {name: of for name, of in chosen.items() if "bitsandbytes" not in name}
    lrs = {optimizer: (PRETRAINING_LR,) for optimizer, _, _ in chosen.values()}
    study = dataclasses.replace(compare.STUDIES["cpu"], lrs=lrs, seeds=SEEDS, extensions=0)
    if quick:
        study = compare.quick(study)
    compare.end_as_by_ctrl_c()
    with compare.opened(out, study, overwrite) as (record, lock):
        driver = compare.Driver(study, out, lock)
        driver.prepare()
        jobs = [  # seed by seed, so that a stopped study is a fair one as well
            compare.Job(optimizer, PRETRAINING_LR, seed, state_dtype)
            for seed in study.seeds
            for optimizer, state_dtype, _ in chosen.values()
        ]
        found = driver.results(jobs)
    runs = {name: found[k :: len(chosen)] for k, name in enumerate(chosen)}
    images.mkdir(parents=True, exist_ok=True)
    _plot_pretraining(comparison, runs, images / "compact_states.png")
    first = next(iter(runs))
    rows = [
        (
            name + " (diverged)" * any(r.diverged for r in of),
            comparison.mean_and_spread([r.final_train for r in of]),
            comparison.mean_and_spread([r.final_held_out for r in of]),
            "–" if name == first else comparison.difference(of, runs[first]),
            f"{comparison.optimizer_ms(of):.2f}",
        )
        for name, of in runs.items()
    ]
    head = ("optimizer", "training MLM", "held-out MLM", f"minus {first}, seed by seed",
            "optimizer, ms a step")  # fmt: skip
    a_run, minutes = found[0], record["seconds"] / 60
    return f"""## Pretraining

The small BERT of [comparison.md](comparison.md), with its data and settings, at the lr that is the
best there for AdamW and for MAdam, {PRETRAINING_LR:g}: {len(a_run.train_mlm)} steps,
{a_run.parameters:,} parameters, {len(study.seeds)} seeds. Losses are nats per masked token at the
end, in training the mean of the last tenth of the steps; differences have their standard error.
{len(found)} runs, two side by side, took {minutes:.0f} minutes on {record["machine"]}.

{table(head, rows)}

![losses](images/compact_states.png)
"""


def _plot_pretraining(comparison: Any, runs: dict[str, list[Any]], path: Path) -> None:
    """Losses with bands of one standard deviation over seeds."""
    figure, axes = comparison.plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for name, of in runs.items():
        if sound := [r for r in of if r.diverged_at is None]:
            comparison.plot_losses(*axes, sound, name, PRETRAINED[name][2])
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=90)
    comparison.plt.close(figure)


# --- the document --------------------------------------------------------------------------------

HEAD = """# Accuracy and memory of compact states

Written by `python bench/compact_states.py{arguments}` in one thread on {machine}, torch {torch};
{seeds} seeds, spread is the standard deviation over them. Codes and rule:
[algorithm.md](algorithm.md#compact-states).

"""


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def _say(*words: str) -> None:
    print(*words, file=sys.stderr, flush=True)


def of_rounding(options: argparse.Namespace) -> str:
    rows = [(kind, *(f"{e:.2%}" for e in errors)) for kind, errors in rounding_errors()]
    return f"""## The rounding of one step

Error after one stochastic rounding, root mean square relative to that of the values, in a
256 x 1024 parameter after 300 gradients whose scales spread over two decades; r is
m / (|mean| + sd), update m / sqrt(mean^2 + sd^2).

{table(("states", "r", "mean", "sd", "x", "update"), rows)}
"""


def of_quadratic(options: argparse.Namespace) -> str:
    steps, trials = (20, 2048) if options.quick else (600, 2048)
    lrs = (0.01,) if options.quick else (0.003, 0.005, 0.01, 0.02)
    rows = []
    for contestant in contestants(options.torchao):
        losses = {
            lr: [quadratic(contestant, lr, seed, steps, trials) for seed in SEEDS] for lr in lrs
        }
        best = min(losses, key=lambda lr: sum(losses[lr]))
        rows.append((contestant.name, f"{best:g}", spread(losses[best])))
        _say(*rows[-1])
    return f"""## Noisy quadratic model

The paper's Sec. 4.2, h = (1, 20), sigma = 0.2, {steps} steps, {trials} trials: mean loss at the
best of the learning rates {", ".join(f"{lr:g}" for lr in lrs)}, the same for all.

{table(("optimizer", "best lr", "loss"), rows)}
"""


def of_transformer(options: argparse.Namespace) -> str:
    steps = 4 if options.quick else 200
    rows = []
    for contestant in contestants(options.torchao):
        runs = [transformer(contestant, seed, steps) for seed in SEEDS]
        rows.append((contestant.name, spread([loss for loss, _ in runs]), f"{runs[0][1]:.2f}"))
        _say(*rows[-1])
    return f"""## A character transformer

Two layers of width 128 over Python's reference manual, {steps} steps of 16 x 64 characters,
warm-up and cosine, weight decay 0.01; ours at lr 3e-3, AdamW and the peers at its usual 1e-3.
Training loss, mean of the last tenth; bytes of state per parameter (vectors stay float32).

{table(("optimizer", "loss", "bytes per parameter"), rows)}
"""


def of_pretraining(options: argparse.Namespace) -> str:
    out = options.out or Path("runs") / f"compact-states{'-quick' * options.quick}"
    images = options.write.parent / "images" if options.write else out
    compare, comparison = map(importlib.import_module, ("compare", "comparison"))
    return pretraining(compare, comparison, out, options.quick, options.overwrite, images)


def of_times(options: argparse.Namespace) -> str:
    tensors, rounds = (2, 3) if options.quick else (40, 9)
    found = times(contestants(options.torchao), tensors, rounds)
    rows = [(name, f"{ratio:.2f}") for name, ratio in found.items()]
    return f"""## Time of a step

{tensors} float32 parameters of 768 x 768, one thread: median over {rounds} rounds of the step's
time by that of torch's fused AdamW in the same round. Of a GPU: [README](../README.md#on-a-gpu).

{table(("optimizer", "time by AdamW's"), rows)}
"""


#: By the names that --only takes, in the order of the document.
STUDIES: dict[str, Callable[[argparse.Namespace], str]] = {
    "rounding": of_rounding,
    "quadratic": of_quadratic,
    "transformer": of_transformer,
    "times": of_times,
    "pretraining": of_pretraining,
}


def _sections(text: str) -> tuple[str, dict[str, str]]:
    """What a document has before its sections, and these by their headings."""
    head, *sections = re.split(r"(?m)^(?=## )", text)
    return head, {section.splitlines()[0]: section.rstrip() + "\n" for section in sections}


def merged(old: str, new: str) -> str:
    """The document with a new section in the place of the one with its heading, or at its end."""
    head, sections = _sections(old)
    sections |= _sections(new)[1]
    return head + "\n".join(sections.values())


def _names(text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := set(chosen) - set(STUDIES):
        raise argparse.ArgumentTypeError(
            f"{', '.join(sorted(unknown))}: not known; there are {', '.join(STUDIES)}"
        )
    return chosen


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    text = HEAD.format(
        arguments=" --quick" if options.quick else "",
        machine=f"a {platform.machine()} CPU",
        torch=torch.__version__,
        seeds=len(SEEDS),
    )
    if options.write and options.write.exists():
        head, sections = _sections(options.write.read_text())
        text = (head if options.only else text) + "\n".join(sections.values())
    for name in options.only or STUDIES:
        text = merged(text, STUDIES[name](options))
        if options.write:  # what has been found stays, whatever comes next
            options.write.write_text(text)
    if not options.write:
        print(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--quick", action="store_true", help="minutes, to see that it runs")
    add("--only", type=_names, metavar="NAMES", help=f"of {', '.join(STUDIES)}; the rest stays")
    add("--torchao", action="store_true", help="torchao's AdamW, too")
    add("--write", type=Path, help="the document, with figures beside it; printed without")
    add("--out", type=Path, help="the pretraining's folder; default runs/compact-states")
    add("--overwrite", action="store_true", help="delete the pretraining that is in its folder")
    options = parser.parse_args()
    sys.path.insert(0, str(EXAMPLE))
    errors = importlib.import_module("errors")
    return int(
        errors.exit_status(
            lambda: run(options), "interrupted; the same command resumes the pretraining"
        )
    )


if __name__ == "__main__":
    sys.exit(main())
