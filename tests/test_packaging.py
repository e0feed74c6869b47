"""The package as architecture.md has it: the kernels mapping, what imports what, how fast."""

import re
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


def test_import_is_quick_and_takes_no_torch():
    code = (
        "import time; t = time.perf_counter(); import amft_fast; t = time.perf_counter() - t; import sys;"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; print(t)"
    )
    assert min(float(run(code)) for _ in range(3)) < 0.3


def test_config_and_command_line_take_no_torch():
    code = "import amft_fast.cli, amft_fast.config, amft_fast.interfaces, sys; print('torch' in sys.modules)"
    assert run(code).strip() == "False"


def test_everything_imports_without_triton():
    """All but the files that hold or launch Triton kernels, which are loaded only when Triton serves, and the one that only
    vLLM's workers load; and the heads work."""
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
        and p.name not in ("rows_launch.py", "vllm_worker.py")
        and not p.name.endswith("_triton.py")
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


def test_imports_run_one_way():
    """kernels/ knows only torch and triton; amft_fast reaches it through ops.py alone; nothing imports bench or tests."""
    for path in (ROOT / "kernels").glob("*.py"):
        assert "amft_fast" not in path.read_text(), path
    for path in (ROOT / "amft_fast").rglob("*.py"):
        text = path.read_text()
        assert path.name == "ops.py" or "import amft_kernels" not in text.replace(
            "from amft_kernels", "import amft_kernels"
        ), path
        assert not re.search(r"^\s*(import|from) (bench|tests)\b", text, re.MULTILINE), path
