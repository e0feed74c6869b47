"""Metadata lives in pyproject.toml; this file holds what it cannot say: the package mapping and the native libraries.

`csrc/` becomes two plain C libraries that `amft_fast/multi_tensor.py` loads through ctypes: no torch header is
included, so the CPU one needs a C++ compiler and four seconds, and neither is bound to a version of torch or Python.
Neither may fail an install: what cannot be built is reported and left out, and torch's own operations serve.

AMFT_NO_EXT=1 builds nothing. AMFT_CUDA=1 builds the CUDA part even where torch is not a CUDA build.
AMFT_CUDA_ARCHS="80;90" chooses the GPU generations (default: the GPUs present, else 80, 90 and 100, as far as nvcc
knows them). CXX and NVCC name the compilers.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-pthread"]
# Compiled beside the baseline and picked at run time, so that the library runs on machines other than this one.
X86_FLAGS = {"avx2": "-mavx2 -mfma", "avx512": "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mfma"}
NVCC_FLAGS = [
    "-O3",
    "-std=c++17",
    "-shared",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden",
    "-cudart",
    "static",
    "--threads",
    "0",
]


class NotBuiltError(Exception):
    """Why a library was left out."""


def run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise NotBuiltError(f"{' '.join(command)} failed:\n{done.stdout.strip()}")


def build_cpu(target: Path) -> str:
    candidates = (os.environ.get("CXX"), "g++", "clang++", "c++")
    cxx = next((found for name in candidates if name and (found := shutil.which(name))), None)
    if cxx is None:
        raise NotBuiltError("no C++ compiler found")
    with tempfile.TemporaryDirectory() as directory:
        objects, defines = [], []

        def compile_lanes(isa: str, flags: str) -> None:
            out = f"{directory}/{isa}.o"
            source = str(CSRC / "multi_tensor_dot_lanes.cpp")
            run([cxx, *CXX_FLAGS, *flags.split(), f"-DAMFT_ISA={isa}", "-c", source, "-o", out])
            objects.append(out)

        compile_lanes("baseline", "")
        if platform.machine().lower() in ("x86_64", "amd64"):
            for isa, flags in X86_FLAGS.items():
                try:
                    compile_lanes(isa, flags)
                    defines.append(f"-DAMFT_HAVE_{isa.upper()}")
                except NotBuiltError:
                    continue  # a compiler that does not know the instruction set
        source = str(CSRC / "multi_tensor_dot_cpu.cpp")
        run([cxx, *CXX_FLAGS, "-shared", *defines, source, *objects, "-o", str(target)])
    return f"built with {cxx}"


def cuda_archs(nvcc: str, torch) -> list[str]:
    wanted = os.environ.get("AMFT_CUDA_ARCHS", "").replace(".", "").replace(",", ";").split(";")
    wanted = [arch for arch in wanted if arch]
    if not wanted and torch is not None and torch.cuda.is_available():
        wanted = sorted({"{}{}".format(*torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())})
    known = subprocess.run([nvcc, "--list-gpu-arch"], stdout=subprocess.PIPE, text=True).stdout.split()
    archs = [arch for arch in wanted or ("80", "90", "100") if f"compute_{arch}" in known]
    if not archs:
        raise NotBuiltError(f"{nvcc} knows none of the architectures {wanted}")
    return archs


def build_cuda(target: Path) -> str:
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which(os.environ.get("NVCC") or (f"{home}/bin/nvcc" if home else "nvcc")) or shutil.which("nvcc")
    if nvcc is None:
        raise NotBuiltError("no nvcc found")
    torch = None
    if importlib.util.find_spec("torch"):
        import torch
    forced = os.environ.get("AMFT_CUDA", "0") not in ("", "0")
    if not forced and (torch is None or torch.version.cuda is None):
        raise NotBuiltError("torch is not a CUDA build" if torch else "torch is not importable at build time")
    archs = cuda_archs(nvcc, torch)
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")  # for GPUs newer than those
    run([nvcc, *NVCC_FLAGS, *codes, str(CSRC / "multi_tensor_dot_cuda.cu"), "-o", str(target)])
    return f"built with {nvcc} for {', '.join(archs)}"


class BuildLibraries(build_ext):
    """Builds the libraries with the compilers' own command lines, and never fails."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            if os.environ.get("AMFT_NO_EXT", "0") not in ("", "0"):
                raise NotBuiltError("AMFT_NO_EXT is set")
            words = (build_cpu if ext.name.endswith("_cpu") else build_cuda)(target)
        except (NotBuiltError, OSError) as error:
            words = f"not built, torch's own operations will serve: {error}"
            if self.inplace or self.editable_mode:
                Path(self.get_ext_filename(ext.name)).unlink(missing_ok=True)  # one left by an earlier install
        print(f"amft-fast: {ext.name}: {words}")


def library(name: str, *sources: str) -> Extension:
    headers = [str(CSRC / "multi_tensor_dot.h")]
    return Extension(name, [str(CSRC / source) for source in sources], depends=headers, optional=True)


setup(
    # `kernels/` is imported as `amft_kernels`: transformers probes the import name `kernels` for another package.
    packages=["amft_kernels", *find_packages(include=["amft_fast", "amft_fast.*"])],
    package_dir={"amft_kernels": "kernels"},
    ext_modules=[
        library("amft_fast._multi_tensor_cpu", "multi_tensor_dot_cpu.cpp", "multi_tensor_dot_lanes.cpp"),
        library("amft_fast._multi_tensor_cuda", "multi_tensor_dot_cuda.cu"),
    ],
    cmdclass={"build_ext": BuildLibraries},
)
