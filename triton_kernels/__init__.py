"""MaxVA in Triton: the operators of the C++ extension (csrc/bindings.cpp) without a compiler.

The same names, arguments, checks and results as `torch.ops.maxva`, for CUDA and ROCm tensors, and
for CPU tensors under TRITON_INTERPRET=1. Needs torch, Triton and maxva_kernels.layouts.
"""

from .operators import INTERPRETED, sum_of_squares, update_, update_packed_, write_control_

__all__ = ["INTERPRETED", "sum_of_squares", "update_", "update_packed_", "write_control_"]
