"""How csrc/ builds: what setup.py does without compilers, nvcc's report, and the CUDA threads' work run on the host."""

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensor_lists import MIXTURES, adam_state, call, make_lists

from amft_fast import multi_tensor

ROOT = Path(__file__).parent.parent
ARCHS = ("80", "90", "100")


def build(tmp_path, **env):
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib")]
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **env}
    done = subprocess.run([*command, "--build-temp", str(tmp_path)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, sorted(path.name for path in tmp_path.glob("lib/amft_fast/*.so"))


def test_without_compilers_or_with_broken_ones_the_install_goes_on_and_says_so(tmp_path):
    for env in ({"PATH": "/nonexistent"}, {"CXX": "false", "PATH": "/usr/bin:/bin"}, {"AMFT_NO_EXT": "1"}):
        said, built = build(tmp_path, **env)
        assert built == []
        for name in ("cpu", "cuda"):
            assert f"amft_fast._multi_tensor_{name}: not built, torch's own operations will serve" in said


def test_order_of_sums_is_that_of_csrc():
    text = (ROOT / "csrc" / "multi_tensor_dot.h").read_text()
    names = re.findall(r"[A-Z0-9_]+", re.search(r"enum Sum \{(.*?)NUM_SUMS", text, re.S)[1])
    short = {"plain_g1": "pg1", "plain_dg": "pdg", "exact_g1": "qg1", "exact_dg": "qdg"}

    def in_csrc(a, b):
        if a in short:
            return f"{short[a]}_{short[b]}".upper()
        return f"{a}_{b}".replace("plain", "p").replace("exact", "q").upper()

    assert names == [in_csrc(a, b) for a, b in multi_tensor.PROBE_SUMS]
    assert int(re.search(r"#define AMFT_ABI (\d+)", text)[1]) == multi_tensor._ABI


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The CUDA library with its host twin, compiled for all of ARCHS, and what ptxas said of it."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on the PATH")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    missing = [arch for arch in ARCHS if f"compute_{arch}" not in known]
    if missing:
        pytest.skip(f"this nvcc does not know sm_{', sm_'.join(missing)}")
    path = tmp_path_factory.mktemp("cuda") / "multi_tensor_cuda.so"
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    # No -O3, which would be for the host's part alone: device code is optimised anyway, and this takes a third of the time.
    flags = ["-std=c++17", "-shared", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=2", "-Xptxas=-v"]
    source = str(ROOT / "csrc" / "multi_tensor_dot_cuda.cu")
    keep = ["--keep", f"--keep-dir={path.parent}"]
    command = [nvcc, *flags, *keep, *codes, "-DAMFT_HOST_TEST", source, "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path, done.stdout + done.stderr


def test_nvcc_reports_no_warning_no_spills_and_registers_for_three_blocks(compiled):
    report = compiled[1]
    assert "warning" not in report
    entries = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        report,
        re.S,
    )
    assert len(entries) == 5 * len(ARCHS) and {entry[1] for entry in entries} == set(ARCHS)
    for name, arch, stack, stores, loads, registers in entries:
        assert (stack, stores, loads) == ("0", "0", "0"), (name, arch)
        assert int(registers) <= 168, (name, arch)  # 65536 registers / (3 blocks of 128 threads), in steps of 8


@pytest.mark.parametrize("arch", ARCHS)
def test_lists_are_read_128_bits_at_a_time(compiled, arch):
    """In what nvcc makes for each generation. A kernel has two ways: vectors where all lists are aligned, else single
    elements; of fp32 four, of 16-bit types eight single loads stand against one of a vector."""
    text = (compiled[0].parent / f"multi_tensor_dot_cuda.compute_{arch}.ptx").read_text()
    kernels = re.split(r"\.entry ", text)[1:]
    streamed = [re.findall(r"ld\.global\.cs\.(\S+)", kernel) for kernel in kernels]
    readers = [loads for loads in streamed if loads]
    assert len(kernels) == 5 and len(readers) == 4  # one kernel adds up the blocks' sums
    for loads in readers:
        single = loads.count("f32") / 4 + loads.count("b16") / 8
        assert set(loads) == {"v4.u32", "f32", "b16"} and loads.count("v4.u32") == single


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("num_u, with_adam", [(1, False), (2, False), (1, True), (2, True)])
@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_what_cuda_threads_do_gives_the_same_sums_on_the_host(compiled, mixture, num_u, with_adam, offset):
    library = ctypes.CDLL(str(compiled[0]))
    library.amft_cuda_chunk.restype = ctypes.c_int64
    i64, i32, pointer = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
    library.amft_multi_tensor_dot_emulated.argtypes = [pointer, pointer, i64, i64, i32, pointer, pointer]

    lists = make_lists(mixture, offset=offset)
    adam = adam_state(lists) if with_adam else None
    table = multi_tensor._table(multi_tensor._named_lists(lists[:num_u], lists[2], lists[3], adam))
    starts = multi_tensor._chunk_starts(table, library.amft_cuda_chunk())
    assert starts.dtype == np.int64 and starts[-1] > len(table)
    scalars = None if adam is None else ctypes.byref(multi_tensor._adam_scalars(adam, adam.clip))
    got = torch.empty(len(multi_tensor.PROBE_SUMS), dtype=torch.float64)
    library.amft_multi_tensor_dot_emulated(
        table.ctypes.data, starts.ctypes.data, len(table), int(starts[-1]), num_u, scalars, got.data_ptr()
    )
    want = call(multi_tensor.multi_tensor_dot_reference, lists, num_u, adam)
    assert torch.allclose(got, want, rtol=1e-11, atol=0)


@pytest.mark.gpu
def test_the_cuda_library_is_built_and_used():
    assert multi_tensor.backends()["cuda"] == "CUDA"
