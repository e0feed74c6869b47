"""amft-fast doctor: what is installed, what will serve here and why, what is missing for what, and known traps.

Versions come from package metadata; only torch is imported. Nothing here raises: a part that fails says so in its place.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

# Shown even when they are absent; the others below only when they are there.
PACKAGES = ("torch", "transformers", "triton", "numpy", "safetensors", "tensorboard", "matplotlib", "vllm", "deepspeed")
IF_THERE = ("flash-attn", "liger-kernel", "peft", "datasets", "trl", "cut-cross-entropy", "torchvision")
IF_THERE += ("kernels", "accelerate")

# Feature, packages it needs, extra that brings them, and the setting that must know it ("" when there is none).
FEATURES = (
    ("Triton kernels on a GPU", ("triton",), "triton", ""),
    ("vLLM rollouts", ("vllm",), "vllm", "rollout.engine=vllm"),
    ("sharded training (ZeRO)", ("deepspeed",), "deepspeed", "engine.kind=deepspeed"),
    ("FlashAttention", ("flash-attn",), "flash", "model.attention=flash_attention_2"),
    ("LoRA", ("peft",), "lora", "model.lora.rank"),
    ("Liger's layers", ("liger-kernel",), "flash", ""),
    ("trackers beside TensorBoard", ("wandb", "trackio", "mlflow-skinny"), "trackers", "log.to"),
    ("mathematics tasks", ("datasets", "pyarrow"), "math", "task.name=math"),
    ("environments of verifiers", ("verifiers",), "verifiers", "task.name=verifiers:NAME"),
    ("benchmarks against other kernels", ("liger-kernel", "cut-cross-entropy", "trl"), "bench", ""),
    ("tests and lint", ("pytest", "hypothesis", "ruff"), "dev", ""),
)


def doctor() -> str:
    """The whole report as text."""
    notes: list[str] = []
    torch = _torch(notes)
    parts: tuple[tuple[str, Callable[[], Iterator[tuple[str, ...]]]], ...] = (
        ("packages", lambda: packages(notes)),
        ("devices", lambda: devices(torch, notes)),
        ("what serves here, and why", lambda: backends(torch)),
        ("compilers", lambda: compilers(torch, notes)),
        ("not installed", lambda: missing()),
    )
    lines = [f"amft-fast {version('amft-fast') or '(source tree, not installed)'}, Python {platform.python_version()}"]
    lines[0] += f", {platform.system()} {platform.machine()}"
    for title, part in parts:
        lines += ["", title, *_table(_rows(part))]
    for trap in (trap_kernels, trap_torchvision, trap_flash_attn, trap_interpreter):
        try:
            notes += trap(torch)
        except Exception as e:
            notes.append(f"{trap.__name__} could not be checked: {_brief(e)}")
    lines += ["", "warnings" if notes else "no warnings", *(f"  ! {note}" for note in notes)]
    return "\n".join(lines)


def _rows(part: Callable[[], Iterator[tuple[str, ...]]]) -> list[tuple[str, ...]]:
    """The rows of a part; what went wrong is its last row."""
    rows = []
    try:
        for row in part():
            rows.append(row)  # noqa: PERF402  the rows before a failure are kept
    except Exception as e:
        rows.append(("?", f"could not be found out: {_brief(e)}"))
    return rows or [("nothing",)]


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows as aligned columns; the last cell of a row may be long."""
    widths = [max((len(row[i]) for row in rows if len(row) > i + 1), default=0) for i in range(max(map(len, rows)))]
    return ["  " + "  ".join([f"{c:<{w}}" for c, w in zip(row[:-1], widths)] + [row[-1]]).rstrip() for row in rows]


def _brief(e: BaseException) -> str:
    """An exception in one line."""
    first = (str(e).strip().splitlines() or [""])[0]
    return f"{type(e).__name__}: {first[:200]}" if first else type(e).__name__


def version(name: str) -> str | None:
    """The installed version of a distribution, None when it is not installed."""
    try:
        return importlib.metadata.version(name)
    except Exception:
        return None


def _torch(notes: list[str]) -> ModuleType | None:
    if version("torch") is None and importlib.util.find_spec("torch") is None:
        notes.append("torch is not installed, nothing can be trained: pip install torch")
        return None
    try:
        return importlib.import_module("torch")
    except Exception as e:
        notes.append(f"torch is installed but cannot be imported ({_brief(e)}): install it anew")
        return None


# ------------------------------------------------------------------------------------------------------------ packages


def bounds() -> dict[str, Any]:
    """The versions that amft-fast's own metadata asks for, as specifiers by package."""
    from packaging.requirements import Requirement

    out: dict[str, Any] = {}
    for text in importlib.metadata.requires("amft-fast") or []:
        requirement = Requirement(text)
        if requirement.specifier and requirement.name not in out:
            out[requirement.name] = requirement.specifier
    return out


def _words(specifier: Any) -> str:
    """>=2.11,<2.14: the lower bound first."""
    return ",".join(sorted(map(str, specifier), reverse=True))


def packages(notes: list[str]) -> Iterator[tuple[str, ...]]:
    """(name, version, remark); versions outside the supported bounds become warnings."""
    try:
        wanted = bounds()
    except Exception as e:
        wanted = {}
        notes.append(
            f"supported versions could not be read from amft-fast's own metadata ({_brief(e)}): pip install -e ."
        )
    for name in (*PACKAGES, *IF_THERE):
        found, specifier = version(name), wanted.get(name)
        if found is None:
            if name in PACKAGES:
                yield name, "–", "not installed"
        elif specifier is None:
            yield name, found, ""
        elif specifier.contains(found.partition("+")[0], prereleases=True):
            yield name, found, f"supported ({_words(specifier)})"
        else:
            notes.append(f"{name} {found} is outside the supported versions: pip install '{name}{_words(specifier)}'")
            yield name, found, f"NOT SUPPORTED, wanted {_words(specifier)}"


def missing() -> Iterator[tuple[str, ...]]:
    """(feature, packages it lacks, how to get them), for features that this version of amft-fast has."""
    for feature, names, extra, setting in FEATURES:
        absent = [name for name in names if version(name) is None]
        if absent and _known(setting):
            yield feature, ", ".join(absent), f"pip install 'amft-fast[{extra}]'"


def _known(setting: str) -> bool:
    """Whether the config knows `section.field=value`."""
    from amft_fast.config import Config

    if not setting:
        return True
    name, _, value = setting.partition("=")
    model: Any = Config
    for part in name.split("."):
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return False
        model = field.annotation
    return not value or value in get_args(model)


# ------------------------------------------------------------------------------------------------------------- devices


def devices(torch: ModuleType | None, notes: list[str]) -> Iterator[tuple[str, ...]]:
    """CPU and GPUs, and why there is no GPU."""
    cores, of = usable_cores(), os.cpu_count() or 1
    threads = f", torch takes {torch.get_num_threads()} threads" if torch is not None else ""
    yield "CPU", f"{cpu_name()}, {cores} of {of} cores usable, {memory_gib():.1f} GiB memory{threads}"
    if torch is None:
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        there = torch.cuda.is_available()
    notes += [f"torch on CUDA: {str(w.message).strip().splitlines()[0]}" for w in caught]
    if not there:
        yield "GPU", why_no_gpu(torch, notes)
        return
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        capability = f"{p.major}.{p.minor}"
        memory = p.total_memory / 2**30
        yield f"GPU {i}", f"{p.name}, {memory:.0f} GiB, compute capability {capability}, CUDA {torch.version.cuda}"
        if (p.major, p.minor) < (8, 0):
            notes.append(f"GPU {i} (compute capability {capability}) has no bf16 units: set model.dtype fp32")
        if not _has_code(torch.cuda.get_arch_list(), p.major, p.minor):
            notes.append(f"this torch has no code for GPU {i} (compute capability {capability}): install another build")


def _has_code(archs: list[str], major: int, minor: int) -> bool:
    """Whether a build for `archs` (sm_80, sm_90a, compute_90) runs on that compute capability. True when it says nothing."""
    known = []
    for arch in archs:
        kind, _, digits = arch.partition("_")
        digits = digits.rstrip("af")
        if digits.isdigit():
            known.append((kind, int(digits[:-1]), int(digits[-1])))
    here = (major, minor)
    return not known or any((a == major and b <= minor) if kind == "sm" else (a, b) <= here for kind, a, b in known)


def why_no_gpu(torch: ModuleType, notes: list[str]) -> str:
    """The reason in a sentence; a GPU that lies idle is a warning."""
    nvidia = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        if nvidia:
            notes.append("there is an NVIDIA driver, but torch is a CPU build: install a CUDA build to use the GPU")
        return "none that torch can use: it is a CPU build; training runs on the CPU"
    if hidden is not None and hidden.strip() in ("", "-1"):
        return f"none: CUDA_VISIBLE_DEVICES={hidden!r} hides them; training runs on the CPU"
    if nvidia:
        notes.append("there is an NVIDIA driver, but torch sees no GPU: the driver may be older than this torch needs")
    return "none; training runs on the CPU"


def cpu_name() -> str:
    """The processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown processor"


def usable_cores() -> int:
    """Cores that this process may use: affinity and the container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


def memory_gib() -> float:
    """Memory of the machine, or of the container when that is less."""
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return float("nan")
    with contextlib.suppress(OSError, ValueError):
        size = min(size, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return size / 2**30


# ------------------------------------------------------------------------------------------------------------ backends


def _parameters(device: str) -> tuple[str, str]:
    """(type that `model.dtype auto` takes, reason)."""
    if device == "cuda":
        return "bf16", "with fp32 masters"
    faster = False
    with contextlib.suppress(Exception):  # `_explained` says what is wrong with ops.py
        faster = importlib.import_module("amft_fast.ops").bf16_is_faster()
    return (
        "fp32",
        "model.dtype bf16 is faster on this CPU, which has AMX" if faster else "bf16 gains nothing on this CPU",
    )


def backends(torch: ModuleType | None) -> Iterator[tuple[str, ...]]:
    """(operation, backend, reason) on the device that `run.device auto` takes."""
    if torch is None:
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    yield "device", device, "run.device auto takes CUDA where there is one"
    yield ("parameters", *_parameters(device))
    yield from _explained(device)
    yield ("attention", *attention(device))
    from amft_fast.model.layers import liger

    function, why = liger("qwen3", device)
    yield "layers", "transformers" if function is None else "Liger", why
    from amft_fast.rollout import decoder

    yield ("rollouts", *decoder.explain(device))


def _explained(device: str) -> Iterator[tuple[str, ...]]:
    """What ops.py says of its operations; the probe's dot-products alone when ops.py cannot be imported."""
    try:
        yield from importlib.import_module("amft_fast.ops").explain(device)
        return
    except Exception as e:
        yield "loss head", "none", f"amft_fast.ops cannot be imported: {_brief(e)}"
    try:
        words = importlib.import_module("amft_fast.multi_tensor").backends()[device]
    except Exception as e:
        yield "multi_tensor_dot", "none", _brief(e)
    else:
        yield "multi_tensor_dot", words, ""


def attention(device: str) -> tuple[str, str]:
    """What `model.attention auto` gives training, and why."""
    import torch

    from amft_fast.model.attention import backend

    name, _, why = backend(device, torch.bfloat16 if device == "cuda" else torch.float32)
    return name, why


def compilers(torch: ModuleType | None, notes: list[str]) -> Iterator[tuple[str, ...]]:
    """What the native library and Triton are built with."""
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    cxx = next((found for name in names if name and (found := shutil.which(name))), None)
    yield "C++", cxx or "none", "" if cxx else "the native library cannot be built, torch serves instead"
    home = os.environ.get("CUDA_HOME")
    nvcc = (shutil.which(f"{home}/bin/nvcc") if home else None) or shutil.which("nvcc")
    cuda = torch is not None and torch.version.cuda is not None
    yield (
        "nvcc",
        nvcc or "none",
        "" if nvcc or not cuda else "the native CUDA library cannot be built, torch serves instead",
    )
    if not cuda or not torch.cuda.is_available():
        return
    cc = next(
        (found for name in (os.environ.get("CC"), "gcc", "clang", "cc") if name and (found := shutil.which(name))), None
    )
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if cc is None:
        notes.append("Triton needs a C compiler at run time and there is none: apt-get install gcc, or set CC")
    if not header.exists():
        notes.append("Triton needs Python.h at run time and it is not there: apt-get install python3-dev")


# --------------------------------------------------------------------------------------------------------------- traps


def trap_kernels(torch: ModuleType | None) -> list[str]:
    """A package called `kernels` that is not Hugging Face's: transformers probes that import name."""
    here = [p for p in (Path("kernels/__init__.py"), Path("kernels.py")) if p.exists()]
    try:
        spec = importlib.util.find_spec("kernels")
    except (ImportError, ValueError):
        spec = None
    origin = here[0].resolve() if here else Path(spec.origin) if spec is not None and spec.origin else None
    if origin is None:  # a folder without __init__.py, such as the repository's own, does no harm
        return []
    try:
        real = importlib.metadata.distribution("kernels").locate_file("kernels/__init__.py")
        if Path(str(real)).resolve() == origin.resolve():
            return []
    except importlib.metadata.PackageNotFoundError:
        pass
    return [
        f"{origin} shadows the import name `kernels`, which transformers probes for another package, and breaks it: "
        "rename it, or start from another folder"
    ]


def trap_torchvision(torch: ModuleType | None) -> list[str]:
    """A torchvision or torchaudio that was built for another torch: importing it fails, and transformers' imports with it."""
    from packaging.requirements import Requirement

    out = []
    ours = version("torch")
    for name in ("torchvision", "torchaudio"):
        theirs = version(name)
        if ours is None or theirs is None:
            continue
        cure = f"install the {name} of the same source and version as torch, or pip uninstall {name} (it is not needed)"
        wanted = [r for text in importlib.metadata.requires(name) or [] if (r := Requirement(text)).name == "torch"]
        exact = next((s.version for r in wanted for s in r.specifier if s.operator == "=="), "")
        builds = [v.partition("+")[2] for v in (ours, theirs)]
        if exact and exact.partition("+")[0] != ours.partition("+")[0]:
            out.append(f"{name} {theirs} was built for torch {exact}, here is {ours}; importing it may fail: {cure}")
        elif (builds[0] == "cpu") != (builds[1] == "cpu") and platform.system() == "Linux":
            kinds = ["a CPU build" if build == "cpu" else "a CUDA build" for build in builds]
            out.append(f"torch {ours} is {kinds[0]} and {name} {theirs} {kinds[1]}; importing the latter fails: {cure}")
    return out


def trap_flash_attn(torch: ModuleType | None) -> list[str]:
    """flash-attn built against another torch: found by metadata, broken on import."""
    if torch is None or version("flash-attn") is None or importlib.util.find_spec("flash_attn_2_cuda") is None:
        return []
    try:
        importlib.import_module("flash_attn_2_cuda")
    except Exception as e:
        return [
            f"flash-attn is installed but cannot be loaded ({_brief(e)}): build it anew for torch {version('torch')}"
        ]
    return []


def trap_interpreter(torch: ModuleType | None) -> list[str]:
    """Settings of the environment that slow everything down or change results."""
    out = []
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        out.append("TRITON_INTERPRET is set: Triton kernels run in Python, a thousand times slower; unset it to train")
    if os.environ.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0"):
        out.append("CUDA_LAUNCH_BLOCKING is set: every kernel waits for the one before; unset it to train")
    if sys.flags.optimize:
        out.append("Python runs with -O: assertions are off")
    return out
