"""The package as architecture.md has it: the kernels mapping, what imports what, how fast."""

import ast
import graphlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_folder_is_imported_as_amft_kernels_and_nothing_is_called_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = (
        "import amft_kernels.linear_policy_loss as m, importlib.util as u; s = u.find_spec('kernels');"
        "print(m.__file__); print(s is None or s.origin is None)"
    )
    file, unshadowed = run(code).split()
    assert Path(file).parent.name == "kernels" or "site-packages" in file
    assert unshadowed == "True"


def test_a_checkout_that_was_not_installed_finds_its_kernels(tmp_path):
    """A copy of the tree on a GPU machine: nothing says there where amft_kernels is, but its place beside the package."""
    site = tmp_path / "site"
    for name in ("amft_fast", "kernels"):
        shutil.copytree(ROOT / name, site / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    code = (
        "import sys; here = lambda p: 'amft' in p or p.startswith(sys.argv[1])\n"
        "sys.path[:] = [p for p in sys.path if p.endswith('site-packages') or not here(p)]\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "import amft_fast.ops; print(amft_fast.ops.linear_policy_loss.__code__.co_filename)"
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code, str(ROOT), str(site)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.stdout.strip() == str(site / "kernels" / "linear_policy_loss.py"), done.stderr


def test_import_takes_nothing_but_the_standard_library():
    code = (
        "import sys; before = set(sys.modules); import amft_fast;"
        "print(*{m.partition('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names))"
    )
    assert run(code).split() == ["amft_fast"]


def test_no_test_file_imports_another():
    """What several need lies in conftest.py or in a module of its own: a test file that is imported is collected twice over."""
    for path in (ROOT / "tests").glob("*.py"):
        assert not re.search(r"^\s*(from|import) test_", path.read_text(), re.MULTILINE), path


def test_no_test_asserts_time_on_a_clock():
    """Machines are slow or busy: tests count operations (operations.py), and clocks serve to give up on what hangs."""
    clocks = {"perf_counter", "monotonic", "time", "perf_counter_ns", "time_ns", "monotonic_ns"}
    for path in (ROOT / "tests").glob("*.py"):
        for statement in ast.walk(ast.parse(path.read_text())):
            if isinstance(statement, ast.Assert):
                called = {
                    n.func.attr for n in ast.walk(statement) if isinstance(n, ast.Call) and hasattr(n.func, "attr")
                }
                assert not called & clocks, f"{path.name}:{statement.lineno}"


def test_config_and_command_line_take_no_torch():
    code = "import amft_fast.cli, amft_fast.config, amft_fast.interfaces, sys; print('torch' in sys.modules)"
    assert run(code).strip() == "False"


def test_everything_imports_without_triton():
    """All but the files that hold or launch Triton kernels, which are loaded only when Triton serves, the one that only vLLM's
    workers load, and those of environments of verifiers; and the heads work."""
    block = (
        "import sys, importlib.machinery as m\n"
        "real = m.PathFinder.find_spec\n"
        "def find_spec(cls, name, path=None, target=None):\n"
        "    return None if name.partition('.')[0] == 'triton' else real(name, path, target)\n"
        "m.PathFinder.find_spec = classmethod(find_spec)\n"
    )
    modules = [
        f"amft_{'kernels' if folder == 'kernels' else 'fast'}."
        + ".".join(p.relative_to(ROOT / folder).with_suffix("").parts)
        for folder in ("kernels", "amft_fast")
        for p in sorted((ROOT / folder).rglob("*.py"))
        if p.name not in ("__init__.py", "__main__.py")
        and p.name != "rows_launch.py"
        and p != ROOT / "amft_fast" / "rollout" / "vllm" / "worker.py"
        and (p.parent.name, p.name) not in (("verifiers", "host.py"), ("verifiers", "harness.py"))
        and not p.name.endswith("_triton.py")
        and p.name != "decode_attention.py"
    ]
    assert len(modules) > 15
    use = (
        "\nimport torch; from amft_fast import ops\n"
        "h, w, t = torch.randn(3, 4), torch.randn(7, 4), torch.tensor([0, 3, 6])\n"
        "assert ops.linear_policy_loss(h, w, t, nll_weight=torch.ones(3)).loss > 0 > ops.linear_logprob(h, w, t)[0].max()\n"
        "assert not [m for m in sys.modules if m.partition('.')[0] == 'triton']\n"
    )
    run(block + "import importlib\n" + "\n".join(f"importlib.import_module({m!r})" for m in modules) + use)


@pytest.mark.parametrize("extra", ["vllm", "deepspeed", "flash", "bench", "dev", "all"])
def test_heavy_dependencies_are_extras(extra):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extra in project["optional-dependencies"]
    assert not any(d.startswith(("vllm", "deepspeed", "flash")) for d in project["dependencies"])


def test_kernels_import_torch_and_triton_alone_and_one_another_without_a_circle():
    """What amft_fast imports, `make lint` holds; its tool cannot see into a folder that is imported by another name."""
    graph = {}
    for path in (ROOT / "kernels").glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = [n.module for n in nodes if isinstance(n, ast.ImportFrom)]
        names += [f"{n.module}.{a.name}" for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names]
        names += [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
        known = {"torch", "triton", "amft_kernels", *sys.stdlib_module_names}
        assert {name.partition(".")[0] for name in names} <= known, path
        graph[path.stem] = {n.split(".")[1] for n in names if n.startswith("amft_kernels.")}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("checks") < order.index("linear_policy_loss")
