"""Builds the C++ (and, where there is a CUDA toolkit, CUDA) extension of maxva-kernels.

MAXVA_BUILD_CUDA    1: with CUDA, or fail; 0: without; unset: with CUDA where it is possible
MAXVA_CUDA_ARCHS    GPU architectures, such as "90" or "80;90+PTX"; unset: "75;80;90;100;120+PTX" as
                    far as the toolkit goes, and those of the GPUs that are visible
MAXVA_NO_EXTENSION  1: no extension at all, Python only
"""

import glob
import os
import platform
import shutil
import sys

from setuptools import setup
from setuptools.command.build_py import build_py

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "tools"))
from cuda_toolkit import (
    default_archs,
    find_cuda_home,
    nvcc_version,
    torch_arch_list,
    visible_gpus,
)

VERSION = "0.1.0"
OLDEST_TORCH = (2, 11)
# no contraction: the source alone says what is fused, so that the CUDA and CPU kernels agree; -g0
# undoes the -g that Python was built with, nine tenths of the extension's size
CPU_FLAGS = ["-O3", "-g0", "-std=c++20", "-fno-math-errno", "-fno-trapping-math"]
CPU_FLAGS += ["-ffp-contract=off"]
NVCC_FLAGS = ["-O3", "-std=c++20", "-fmad=false"]
# the first whose kernels take 32,764 bytes of arguments
OLDEST_CUDA = "12.1"


def why_no_cuda(torch, cuda_home):
    """Why a CUDA build is not possible here, with what to do; None where it is."""
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch "
            f"(https://pytorch.org/get-started) and build with pip install --no-build-isolation"
        )
    if cuda_home is None:
        return (
            "no CUDA toolkit is found (bin/nvcc and include/cuda_runtime.h); install CUDA "
            f"{torch.version.cuda} or set CUDA_HOME to its root"
        )
    version = nvcc_version(cuda_home)
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return (
            f"the toolkit in {cuda_home} is CUDA {version}, torch {torch.__version__} is built "
            f"with CUDA {torch.version.cuda}; set CUDA_HOME to a toolkit of the same major version"
        )
    if tuple(map(int, version.split("."))) < tuple(map(int, OLDEST_CUDA.split("."))):
        return (
            f"the toolkit in {cuda_home} is CUDA {version}; set CUDA_HOME to one of {OLDEST_CUDA} "
            f"or later"
        )
    return None


def asked(variable):
    """The value of an environment variable that is a switch: "", "0" or "1"."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        sys.exit(f"maxva-kernels: {variable} must be 0, 1 or unset, is {value!r}")
    return value


def wants_cuda(torch, cuda_home):
    cuda = asked("MAXVA_BUILD_CUDA")
    reason = "MAXVA_BUILD_CUDA=0" if cuda == "0" else why_no_cuda(torch, cuda_home)
    if cuda == "1" and reason:
        sys.exit(f"maxva-kernels: MAXVA_BUILD_CUDA=1, but {reason}")
    if reason:
        print(f"maxva-kernels: building for the CPU only: {reason}")
    return reason is None


def import_torch():
    oldest = ".".join(map(str, OLDEST_TORCH))
    try:
        import torch
    except ImportError as error:
        sys.exit(
            f"maxva-kernels: the extension is built against the torch it will run with, which is "
            f"not to be seen here ({error}). With torch >= {oldest} installed, build with pip "
            f"install --no-build-isolation; or without the extension: MAXVA_NO_EXTENSION=1"
        )
    if release(torch) < OLDEST_TORCH:
        sys.exit(
            f"maxva-kernels: torch >= {oldest} is needed, {torch.__version__} is installed here"
        )
    return torch


def release(torch):
    return tuple(map(int, torch.__version__.split(".")[:2]))


class PurePython(build_py):
    """Leaves out what an earlier build of the extension left in the source tree."""

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if module[1] != "_build_info"]

    def find_data_files(self, package, src_dir):
        files = super().find_data_files(package, src_dir)
        return [file for file in files if not file.endswith((".so", ".pyd"))]


def write_build_info(path, torch, with_cuda):
    archs = os.environ["TORCH_CUDA_ARCH_LIST"] if with_cuda else None
    with open(path, "w") as info:
        info.write('"""What the extension was built with; written by setup.py."""\n\n')
        info.write(f"TORCH_VERSION = {torch.__version__!r}\n")
        info.write(f"CUDA_VERSION = {torch.version.cuda if with_cuda else None!r}\n")
        info.write(f"CUDA_ARCHS = {archs!r}\n")


def description():
    """What pyproject.toml leaves to the build: the extension, and the torch that it needs."""
    if asked("MAXVA_NO_EXTENSION") == "1":
        torch_needed = ">=" + ".".join(map(str, OLDEST_TORCH))
        return {
            "version": VERSION,
            "install_requires": [f"torch{torch_needed}", "typing_extensions"],
            "cmdclass": {"build_py": PurePython},
        }
    torch = import_torch()
    cuda_home = find_cuda_home()
    with_cuda = wants_cuda(torch, cuda_home)
    if with_cuda:
        # torch's build code reads both at import
        os.environ["CUDA_HOME"] = str(cuda_home)
        if archs := os.environ.get("MAXVA_CUDA_ARCHS"):
            os.environ["TORCH_CUDA_ARCH_LIST"] = torch_arch_list(archs)
        elif not os.environ.get("TORCH_CUDA_ARCH_LIST"):
            os.environ["TORCH_CUDA_ARCH_LIST"] = default_archs(cuda_home, visible_gpus(torch.cuda))
        print(
            f"maxva-kernels: building with CUDA {nvcc_version(cuda_home)} from {cuda_home} for "
            f"{os.environ['TORCH_CUDA_ARCH_LIST']}"
        )
    from torch.utils.cpp_extension import (
        BuildExtension,
        CppExtension,
        CUDAExtension,
        get_cxx_compiler,
    )

    class BuildWithInfo(BuildExtension):
        """Leaves beside the extension what it was built with."""

        def run(self):
            if shutil.which(get_cxx_compiler()) is None:
                sys.exit(
                    f"maxva-kernels: there is no C++ compiler {get_cxx_compiler()!r}; install one, "
                    f"set CXX, or build without the extension: MAXVA_NO_EXTENSION=1"
                )
            super().run()
            folder = os.path.dirname(self.get_ext_fullpath("maxva_kernels._C"))
            write_build_info(os.path.join(folder, "_build_info.py"), torch, with_cuda)

    # at::parallel_for is a header template over OpenMP; macOS torch uses its own threads instead
    openmp = [] if platform.system() == "Darwin" else ["-fopenmp"]
    cxx = [*CPU_FLAGS, "-fopenmp-simd", *openmp]
    sources = sorted(glob.glob("csrc/*.cpp"))
    if with_cuda:
        extension = CUDAExtension(
            "maxva_kernels._C",
            sources + sorted(glob.glob("csrc/*.cu")),
            define_macros=[("MAXVA_WITH_CUDA", None)],
            extra_compile_args={"cxx": cxx, "nvcc": NVCC_FLAGS},
            extra_link_args=openmp,
        )
    else:
        extension = CppExtension(
            "maxva_kernels._C",
            sources,
            extra_compile_args={"cxx": cxx},
            extra_link_args=openmp,
        )
    major, minor = release(torch)
    device = "cu" + torch.version.cuda.replace(".", "") if with_cuda else "cpu"
    return {
        "version": f"{VERSION}+torch{major}.{minor}.{device}",
        "install_requires": [f"torch=={major}.{minor}.*", "typing_extensions"],
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildWithInfo},
    }


setup(**description())
