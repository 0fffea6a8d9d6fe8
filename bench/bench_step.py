"""Step time of the fused optimizers on BERT's parameter lists, paired with torch's fused AdamW.

Run by `make bench`. Every comparison is one pytest-benchmark entry; a round runs each of its
contenders once, and their own times, bytes and ratios stand in `extra_info`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from foreach_maxva import ForeachMAdam
from measure import STREAM_BYTES, Rounds, copied, make_groups, parameters, stream
from shapes import MODELS, num_parameters

from maxva_kernels import FusedLaMAdam, FusedMAdam, MAdam

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MAX_GRAD_NORM = 1.0

Groups = list[dict[str, Any]]


def _clip_then_step(groups: Groups) -> Callable[[], object]:
    optimizer = FusedMAdam(copied(groups))
    params = parameters(groups)

    def step() -> None:
        # no clipping takes place, so that the gradients stay as they are from round to round
        torch.nn.utils.clip_grad_norm_(params, 1e30)
        optimizer.step()

    return step


#: name -> (bytes moved per parameter, what makes its step)
CONTENDERS: dict[str, tuple[int | None, Callable[[Groups], Callable[[], object]]]] = {
    "AdamW(fused=True)": (28, lambda g: torch.optim.AdamW(copied(g), fused=True).step),
    "FusedMAdam": (44, lambda g: FusedMAdam(copied(g)).step),
    "FusedLaMAdam": (44, lambda g: FusedLaMAdam(copied(g)).step),
    "FusedMAdam(max_grad_norm)": (
        48,
        lambda g: FusedMAdam(copied(g), max_grad_norm=MAX_GRAD_NORM).step,
    ),
    "clip_grad_norm_ + FusedMAdam": (56, _clip_then_step),
    "foreach MAdam": (None, lambda g: ForeachMAdam(copied(g)).step),
    "MAdam (eager reference)": (None, lambda g: MAdam(copied(g)).step),
}

ADAMW = "AdamW(fused=True)"
CLIP = "clip_grad_norm_ + FusedMAdam"
#: id -> (model, contenders, baseline of the ratios, threads or None for all)
COMPARISONS: dict[str, tuple[str, list[str], str, int | None]] = {
    "bert-base": ("bert-base", [ADAMW, "FusedMAdam", "FusedLaMAdam"], ADAMW, None),
    "bert-base-1-thread": ("bert-base", [ADAMW, "FusedMAdam", "FusedLaMAdam"], ADAMW, 1),
    "bert-base-clipping": ("bert-base", [CLIP, "FusedMAdam(max_grad_norm)"], CLIP, None),
    "bert-base-without-kernel": (
        "bert-base",
        ["FusedMAdam", "foreach MAdam", "MAdam (eager reference)"],
        "FusedMAdam",
        None,
    ),
    "bert-large-madam": ("bert-large", [ADAMW, "FusedMAdam"], ADAMW, None),
    "bert-large-lamadam": ("bert-large", [ADAMW, "FusedLaMAdam"], ADAMW, None),
    "400-tensors-of-64": ("tiny-400", [ADAMW, "FusedMAdam", "FusedLaMAdam"], ADAMW, None),
}


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_step(comparison: str, benchmark: Any, results: list[dict[str, Any]]) -> None:
    model, contenders, baseline, threads = COMPARISONS[comparison]
    if DEVICE != "cpu" and threads:
        pytest.skip("threads are of the CPU")
    if threads:
        torch.set_num_threads(threads)
    shapes = MODELS[model]
    numel = num_parameters(shapes)
    groups = make_groups(shapes, DEVICE)
    steps = {name: CONTENDERS[name][1](groups) for name in contenders}
    # the yardstick runs in the same rounds, over as many bytes as fit beside the model
    stream_numel = min(max(numel, 1 << 20), 1 << 26)
    steps["a.add_(b)"] = stream(stream_numel, DEVICE)
    rounds = Rounds(steps, DEVICE)
    rounds.warm_up()
    slow = "MAdam (eager reference)" in contenders
    count = 200 if numel < 1 << 20 else 7 if slow else 25
    benchmark.pedantic(rounds, rounds=count, iterations=1)

    timings = rounds.timings()
    bandwidth = STREAM_BYTES * stream_numel / timings["a.add_(b)"].median
    for name in contenders:
        bytes_per_parameter = CONTENDERS[name][0]
        rate = bytes_per_parameter and bytes_per_parameter * numel / timings[name].median
        row = {
            "comparison": comparison,
            "threads": torch.get_num_threads() if DEVICE == "cpu" else None,
            "contender": name,
            "parameters": numel,
            "tensors": len(shapes),
            "ms": timings[name].median * 1e3,
            "bytes_per_parameter": bytes_per_parameter,
            "gb_per_s": rate and rate / 1e9,
            "share_of_stream": rate and rate / bandwidth,
            "baseline": baseline,
            "ratio": timings[name].ratio_to(timings[baseline]),
        }
        results.append(row)
        benchmark.extra_info[name] = row
    assert all(timing.median > 0 for timing in timings.values())
