"""What compact states cost in accuracy: writes docs/compact_states.md.

    python bench/compact_states.py [--quick] [--write docs/compact_states.md]

Four studies in one thread: the rounding of one step, by slot; the noisy quadratic model of the
paper's Sec. 4.2; a small character transformer; the time of a step. bitsandbytes' 8-bit AdamW
takes part where it is installed, torchao's with --torchao (its step is compiled first). Some
minutes on a core.
"""

from __future__ import annotations

import argparse
import importlib
import math
import platform
import pydoc_data.topics
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
    sd = (state["exp_avg_sq"] / w - mean.square()).clamp(min=0).sqrt()
    true = Moments(state["exp_avg"], mean, sd, w)
    words = random_words(p.numel(), torch.tensor(1), (0, 0, 0, p.numel(), p.numel(), 0))
    for kind, dtype in WORD_DTYPE.items():
        stored: Packed = pack(true, "madam", torch.zeros(shape, dtype=dtype), words)
        found = unpack(stored, "madam")
        pairs = [
            (_r(found), _r(true)), (found.mean, mean), (found.sd, sd),
            (_update(found), _update(true)),
        ]  # fmt: skip
        errors = [float((a - b).norm() / b.norm()) for a, b in pairs]
        of_w = float((found.w - w).norm() / fold(w).norm())  # x changes its sign at w = 1/2
        yield kind, [*errors[:3], of_w, errors[3]]


def _r(moments: Moments) -> Tensor:
    return moments.m / (moments.mean.abs() + moments.sd)


def _update(moments: Moments) -> Tensor:
    return moments.m / (moments.mean.square() + moments.sd.square()).sqrt()


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


# --- the document --------------------------------------------------------------------------------

TEXT = """# Accuracy and memory of compact states

Written by `python bench/compact_states.py{arguments}` in one thread on {machine}, torch {torch};
{seeds} seeds, spread is the standard deviation over them. Codes and rule:
[algorithm.md](algorithm.md#compact-states).

## The rounding of one step

Error of each slot after one stochastic rounding, root mean square relative to that of the values,
in a 256 x 1024 parameter after 300 gradients whose scales spread over two decades; `update` is
m / sqrt(mean^2 + sd^2).

{rounding}

## Noisy quadratic model

The paper's Sec. 4.2, h = (1, 20), sigma = 0.2, {steps} steps, {trials} trials: mean loss at the
best of the learning rates {lrs}, the same for all.

{quadratic}

## A character transformer

Two layers of width 128 over Python's reference manual, {net_steps} steps of 16 x 64 characters,
warm-up and cosine, weight decay 0.01; ours at lr 3e-3, AdamW and the peers at its usual 1e-3.
Training loss, mean of the last tenth; bytes of state per parameter (vectors stay float32).

{transformer}

## Time of a step

{tensors} float32 parameters of 768 x 768, one thread: median over {rounds} rounds of the step's
time by that of torch's fused AdamW in the same round.

{times}
"""


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="seconds, to see that it runs")
    parser.add_argument("--torchao", action="store_true", help="torchao's AdamW, too")
    parser.add_argument("--write", type=Path, help="the document; printed without")
    args = parser.parse_args()
    torch.set_num_threads(1)
    steps, trials, net_steps = (20, 2048, 4) if args.quick else (600, 2048, 200)
    lrs = (0.01,) if args.quick else (0.003, 0.005, 0.01, 0.02)
    tensors, rounds = (2, 3) if args.quick else (40, 9)
    rounding = [(kind, *(f"{e:.2%}" for e in errors)) for kind, errors in rounding_errors()]
    of_quadratic, of_transformer = [], []
    found = contestants(args.torchao)
    for contestant in found:
        losses = {
            lr: [quadratic(contestant, lr, seed, steps, trials) for seed in SEEDS] for lr in lrs
        }
        best = min(losses, key=lambda lr: sum(losses[lr]))
        of_quadratic.append((contestant.name, f"{best:g}", spread(losses[best])))
        runs = [transformer(contestant, seed, net_steps) for seed in SEEDS]
        of_transformer.append(
            (contestant.name, spread([loss for loss, _ in runs]), f"{runs[0][1]:.2f}")
        )
        print(*of_quadratic[-1], *of_transformer[-1][1:], file=sys.stderr, flush=True)
    of_times = [(name, f"{ratio:.2f}") for name, ratio in times(found, tensors, rounds).items()]
    text = TEXT.format(
        arguments=" --quick" if args.quick else "",
        machine=f"a {platform.machine()} CPU",
        torch=torch.__version__,
        seeds=len(SEEDS),
        rounding=table(("states", "r", "mean", "sd", "x", "update"), rounding),
        steps=steps,
        trials=trials,
        lrs=", ".join(f"{lr:g}" for lr in lrs),
        quadratic=table(("optimizer", "best lr", "loss"), of_quadratic),
        net_steps=net_steps,
        transformer=table(("optimizer", "loss", "bytes per parameter"), of_transformer),
        tensors=tensors,
        rounds=rounds,
        times=table(("optimizer", "time by AdamW's"), of_times),
    )
    if args.write is None:
        print(text)
    else:
        args.write.write_text(text)


if __name__ == "__main__":
    main()
