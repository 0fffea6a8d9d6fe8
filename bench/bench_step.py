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
BACKEND = measured_backends(DEVICE.type)[0]

#: id -> (model, backend of ours, baseline of the ratios, other contenders, threads or None for all)
COMPARISONS: dict[str, tuple[str, str, str, list[str], int | None]] = {
    "bert-base": ("bert-base", BACKEND, BASELINE, ["FusedMAdam", "FusedLaMAdam"], None),
    "bert-base-1-thread": ("bert-base", BACKEND, BASELINE, ["FusedMAdam", "FusedLaMAdam"], 1),
    "bert-base-clipping": ("bert-base", BACKEND, "AdamW-fused+clip", ["FusedMAdam+clip"], None),
    "bert-base-statistics": ("bert-base", BACKEND, "FusedMAdam", ["FusedMAdam+stats"], None),
    "bert-base-foreach": ("bert-base", BACKEND, "FusedMAdam", ["MAdam-foreach"], None),
    "bert-base-eager": ("bert-base", "eager", BASELINE, ["FusedMAdam"], None),
    "bert-large-madam": ("bert-large", BACKEND, BASELINE, ["FusedMAdam"], None),
    "bert-large-lamadam": ("bert-large", BACKEND, BASELINE, ["FusedLaMAdam"], None),
    "400-tensors-of-64": ("tiny-400x64", BACKEND, BASELINE, ["FusedMAdam", "FusedLaMAdam"], None),
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_step(name: str, benchmark: Any, results: list[Row]) -> None:
    model, backend, baseline, others, threads = COMPARISONS[name]
    if DEVICE.type != "cpu" and threads:
        pytest.skip("threads are of the CPU")
    if threads:
        torch.set_num_threads(threads)
    used = torch.get_num_threads() if DEVICE.type == "cpu" else None
    contenders = [c for each in (baseline, *others) for c in parse(each, [backend])]
    case = Case(MODELS[model], "float32", contenders, contenders[0], DEVICE, used)
    comparison = Comparison(case)
    slow = backend == "eager" or "MAdam-foreach" in others
    small = case.model.numel < 1 << 20
    benchmark.pedantic(comparison, rounds=100 if small else 5 if slow else 25, iterations=1)
    rows = comparison.rows()
    results += rows
    benchmark.extra_info |= {f"{row['optimizer']} ({row['backend']})": row for row in rows}
    assert len(rows) == len(contenders), comparison.problems
