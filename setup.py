"""Builds the C++ (and, where there is a CUDA toolkit, CUDA) extension of maxva-kernels."""

import glob
import os
import platform

from setuptools import setup
from setuptools.command.build_py import build_py

CPU_FLAGS = ["-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]


class PurePython(build_py):
    """Leaves out what an earlier build of the extension left in the source tree."""

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if module[1] != "_build_info"]

    def find_data_files(self, package, src_dir):
        files = super().find_data_files(package, src_dir)
        return [file for file in files if not file.endswith((".so", ".pyd"))]


def extensions():
    if os.environ.get("MAXVA_NO_EXTENSION") == "1":
        return {"cmdclass": {"build_py": PurePython}}
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
