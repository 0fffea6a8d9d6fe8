"""Builds the C++ (and, where there is a CUDA toolkit, CUDA) extension of maxva-kernels."""

import glob
import os
import platform

from setuptools import setup

CPU_FLAGS = ["-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]


def extensions():
    if os.environ.get("MAXVA_NO_EXTENSION") == "1":
        return {}
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    with open("maxva_kernels/_build_info.py", "w") as info:
        info.write(f"TORCH_VERSION = {torch.__version__!r}\n")

    # at::parallel_for is a header template over OpenMP; macOS torch uses its own threads instead
    openmp = [] if platform.system() == "Darwin" else ["-fopenmp"]
    simd = ["-fopenmp-simd"]
    extension = CppExtension(
        "maxva_kernels._C",
        sorted(glob.glob("csrc/*.cpp")),
        extra_compile_args={"cxx": CPU_FLAGS + simd + openmp},
        extra_link_args=openmp,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(**extensions())
