"""amft-fast doctor: it always answers, and it names the traps."""

import importlib.metadata
import importlib.util
import sys
from types import SimpleNamespace

import pytest

from amft_fast.cli import main
from amft_fast.doctor import installed as doctor


@pytest.fixture
def versions(monkeypatch):
    """Makes distributions look installed in a version, or absent (None)."""
    real = importlib.metadata.version

    def pretend(**changes):
        changes = {k.replace("_", "-"): v for k, v in changes.items()}

        def version(name):
            if name in changes:
                if changes[name] is None:
                    raise importlib.metadata.PackageNotFoundError(name)
                return changes[name]
            return real(name)

        monkeypatch.setattr(importlib.metadata, "version", version)

    return pretend


def gpu_torch(capability=(9, 0), archs=("sm_80", "sm_90"), available=True):
    """A torch with one GPU, as far as doctor looks at it."""
    properties = SimpleNamespace(name="Test GPU", total_memory=80 * 2**30, major=capability[0], minor=capability[1])
    cuda = SimpleNamespace(
        is_available=lambda: available,
        device_count=lambda: 1,
        get_device_properties=lambda i: properties,
        get_arch_list=lambda: list(archs),
    )
    return SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda="13.0", hip=None), get_num_threads=lambda: 2)


def test_command_answers(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    words = (
        "packages",
        "torch",
        "transformers",
        "devices",
        "CPU",
        "attention",
        "rollouts",
        "multi_tensor_dot",
        "compilers",
    )
    for word in words:
        assert word in out
    assert "Traceback" not in out
    assert all(len(line) < 400 for line in out.splitlines())


def test_versions_outside_the_bounds_are_named(versions):
    versions(torch="2.9.1+cu128", transformers="4.57.0")
    text = doctor.doctor()
    wanted = ",".join(sorted(map(str, doctor.bounds()["torch"]), reverse=True))
    assert wanted.startswith(">=2.11,<2.")
    assert f"! torch 2.9.1+cu128 is outside the supported versions: pip install 'torch{wanted}'" in text
    assert "! transformers 4.57.0 is outside" in text


def test_what_is_missing_is_said_with_its_cure(versions):
    versions(triton=None, flash_attn=None)
    text = doctor.doctor()
    assert "pip install 'amft-fast[triton]'" in text and "pip install 'amft-fast[flash]'" in text


def test_features_of_other_versions_are_not_offered(monkeypatch):
    monkeypatch.setattr(doctor, "FEATURES", (("time travel", ("nosuchpackage",), "x", "engine.kind=tardis"),))
    assert not list(doctor.missing())
    monkeypatch.setattr(doctor, "FEATURES", (("speed", ("nosuchpackage",), "x", "engine.kind=local"),))
    assert list(doctor.missing()) == [("speed", "nosuchpackage", "pip install 'amft-fast[x]'")]


def test_torch_that_does_not_import(monkeypatch):
    def fail(name, package=None):
        raise OSError("libcudart.so.13: cannot open shared object file\nmore lines")

    monkeypatch.setattr(doctor.importlib, "import_module", fail)
    text = doctor.doctor()
    assert (
        "torch is installed but cannot be imported (OSError: libcudart.so.13: cannot open shared object file)" in text
    )
    assert "more lines" not in text


def test_without_torch(monkeypatch, versions):
    versions(torch=None)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "torch" else find(n, *a))
    assert "torch is not installed" in doctor.doctor()


@pytest.mark.parametrize("part", ["packages", "devices", "backends", "compilers", "missing", "trap_kernels"])
def test_a_part_that_fails_leaves_the_others(monkeypatch, part):
    def fail(*args):
        raise RuntimeError("broken")

    monkeypatch.setattr(doctor, part, fail)
    if part == "trap_kernels":
        fail.__name__ = part
    text = doctor.doctor()
    assert "RuntimeError: broken" in text
    assert "compilers" in text and "warnings" in text


def test_operations_that_cannot_be_imported_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "amft_fast.ops", None)
    monkeypatch.setitem(sys.modules, "amft_fast.multi_tensor", None)
    text = "\n".join(" ".join(row) for row in doctor.backends(gpu_torch(available=False)))
    assert "amft_fast.ops cannot be imported" in text and "multi_tensor_dot none" in text


@pytest.mark.parametrize("amx,words", [(True, "bf16 is faster on this CPU"), (False, "bf16 gains nothing on this CPU")])
def test_a_cpu_with_products_in_bf16_is_told(amx, words, monkeypatch):
    from amft_fast import ops

    monkeypatch.setattr(ops, "bf16_is_faster", lambda: amx)
    text = "\n".join(" ".join(row) for row in doctor.backends(gpu_torch(available=False)))
    assert "parameters fp32" in text and words in text


def test_gpu_is_described_and_its_limits_named():
    notes: list[str] = []
    rows = list(doctor.devices(gpu_torch(), notes))
    assert rows[1] == ("GPU 0", "Test GPU, 80 GiB, compute capability 9.0, CUDA 13.0") and not notes
    list(doctor.devices(gpu_torch((7, 5)), notes))
    assert len(notes) == 2 and "no bf16 units" in notes[0] and "no code for GPU 0" in notes[1]


@pytest.mark.parametrize(
    "archs, capability, runs",
    [
        (["sm_80", "sm_90"], (8, 6), True),
        (["sm_80", "sm_90"], (10, 0), False),
        (["sm_80", "compute_90"], (10, 0), True),
        (["sm_90a"], (9, 0), True),
        (["sm_86"], (8, 0), False),
        (["sm_120"], (12, 0), True),
        ([], (9, 0), True),
    ],
)
def test_which_builds_run_where(archs, capability, runs):
    assert doctor._has_code(archs, *capability) is runs


def test_why_there_is_no_gpu(monkeypatch):
    torch = gpu_torch(available=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    notes: list[str] = []
    assert "training runs on the CPU" in doctor.why_no_gpu(torch, notes)
    assert "driver may be older" in notes[0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES='' hides them" in doctor.why_no_gpu(torch, notes)
    torch.version.cuda = None
    assert "CPU build" in doctor.why_no_gpu(torch, notes) and "torch is a CPU build" in notes[-1]


def test_folder_called_kernels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "kernels").mkdir()
    assert doctor.trap_kernels(None) == []  # without __init__.py it does no harm
    (tmp_path / "kernels" / "__init__.py").touch()
    (note,) = doctor.trap_kernels(None)
    assert str(tmp_path) in note and "shadows the import name `kernels`" in note


@pytest.mark.parametrize(
    "torch, torchvision, needs, trap",
    [
        ("2.13.0+cpu", "0.28.0+cpu", "torch==2.13.0", ""),
        ("2.13.0", "0.28.0", "torch==2.13.0", ""),
        ("2.13.0+cpu", "0.28.0", "torch==2.13.0", "a CUDA build"),
        ("2.13.0+cu130", "0.28.0+cpu", "torch==2.13.0", "a CPU build"),
        ("2.13.0", "0.26.0", "torch (==2.11.0)", "built for torch 2.11.0"),
        ("2.13.0", None, "", ""),
    ],
)
def test_torchvision_of_another_build(versions, monkeypatch, torch, torchvision, needs, trap):
    versions(torch=torch, torchvision=torchvision, torchaudio=None)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["numpy", *([needs] if needs else [])])
    monkeypatch.setattr(doctor.platform, "system", lambda: "Linux")
    notes = doctor.trap_torchvision(None)
    assert len(notes) == bool(trap) and (not trap or trap in notes[0])


def test_slow_settings_are_named(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert any("TRITON_INTERPRET" in note for note in doctor.trap_interpreter(None))
