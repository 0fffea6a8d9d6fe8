"""Step time of the fused optimizers on BERT's parameter lists, paired with torch's fused AdamW.

Run by `make bench`: what `maxva-profile` measures, as pytest-benchmark entries. A round runs each
contender once; their own times, bytes and ratios stand in `extra_info`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from maxva_kernels.profile.comparison import Case, Comparison, Row
from maxva_kernels.profile.contenders import BASELINE, measured_backends, parse
from maxva_kernels.profile.models import MODELS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

OURS = ["FusedMAdam", "FusedLaMAdam"]

#: id -> (model, baseline of the ratios, other contenders, threads or None for all)
COMPARISONS: dict[str, tuple[str, str, list[str], int | None]] = {
    "bert-base": ("bert-base", BASELINE, OURS, None),
    "bert-base-1-thread": ("bert-base", BASELINE, OURS, 1),
    "bert-base-clipping": ("bert-base", "AdamW-fused+clip", ["FusedMAdam+clip"], None),
    "bert-base-compact": (
        "bert-base",
        BASELINE,
        ["FusedMAdam", "FusedMAdam+bfloat16", "FusedMAdam+int8"],
        None,
    ),
    "bert-base-statistics": ("bert-base", "FusedMAdam", ["FusedMAdam+stats"], None),
    "bert-base-without-kernel": ("bert-base", "FusedMAdam", ["MAdam-foreach"], None),
    "bert-large-madam": ("bert-large", BASELINE, ["FusedMAdam"], None),
    "bert-large-lamadam": ("bert-large", BASELINE, ["FusedLaMAdam"], None),
    "400-tensors-of-64": ("tiny-400x64", BASELINE, OURS, None),
    "200-tensors-of-4096-200-of-64": (
        "tiny-200x4096-200x64",
        BASELINE,
        ["FusedMAdam", "FusedMAdam+bfloat16", "FusedMAdam+int8"],
        None,
    ),
}


def backends(name: str) -> list[str]:
    """The best there is, and the reference where kernels are compared with what one has without."""
    return [measured_backends(DEVICE.type)[0], *(["eager"] if "without-kernel" in name else [])]


@pytest.mark.parametrize("name", COMPARISONS)
def test_step(name: str, benchmark: Any, results: list[Row]) -> None:
    model, baseline, others, threads = COMPARISONS[name]
    if DEVICE.type != "cpu" and threads:
        pytest.skip("threads are of the CPU")
    if threads:
        torch.set_num_threads(threads)
    used = torch.get_num_threads() if DEVICE.type == "cpu" else None
    contenders = [c for each in (baseline, *others) for c in parse(each, backends(name))]
    case = Case(MODELS[model], "float32", contenders, contenders[0], DEVICE, used)
    comparison = Comparison(case)
    slow, small = "without-kernel" in name, case.model.numel < 1 << 20
    benchmark.pedantic(comparison, rounds=100 if small else 5 if slow else 25, iterations=1)
    rows = comparison.rows()
    results += rows
    benchmark.extra_info |= {f"{row['optimizer']} ({row['backend']})": row for row in rows}
    assert len(rows) == len(contenders), comparison.problems
