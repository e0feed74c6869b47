"""Measurements: `python -m bench NAME`. Importing it makes `amft_kernels` this checkout's `kernels/`, installed or not."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def _map_kernels() -> None:
    """As setup.py maps it. What is measured has to be the code whose commit the results name."""
    if "amft_kernels" not in sys.modules:
        spec = importlib.machinery.ModuleSpec("amft_kernels", None, is_package=True)
        spec.submodule_search_locations = [str(ROOT / "kernels")]
        sys.modules["amft_kernels"] = importlib.util.module_from_spec(spec)


_map_kernels()
