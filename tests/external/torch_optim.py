"""Runs the TestOptimRenewed of a torch checkout (test/test_optim.py) over our optimizers.

PYTORCH_SOURCE names the checkout. This file does not match pytest's pattern, so that it only runs
where it is named: `make test-external`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from torch.testing._internal import common_optimizers
from torch_infos import FUSED, REFERENCE

import maxva_kernels

# without a kernel fused=True would be the reference, compared with itself
assert maxva_kernels.backends()["cpu"] == "available", maxva_kernels.backends()["cpu"]
sys.path.insert(0, str(Path(os.environ["PYTORCH_SOURCE"], "test")))
common_optimizers.optim_db[:] = FUSED + REFERENCE  # before the import, which reads it

import test_optim  # noqa: E402

# one class per device; the module's other classes test torch's schedulers and averaging
globals().update({k: v for k, v in vars(test_optim).items() if k.startswith("TestOptimRenewed")})
