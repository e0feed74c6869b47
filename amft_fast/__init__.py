"""amft-fast: single-stage SFT + RL fine-tuning with a learned mixing weight. Importing it imports no torch.

`train`, `evaluate`, `compare`, `Run` (amft_fast/api.py), `Config` and `UserError` are loaded when they are asked for.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amft_fast.api import Run, compare, evaluate, train
    from amft_fast.config import Config
    from amft_fast.errors import UserError

__all__ = ["Config", "Run", "UserError", "compare", "evaluate", "train"]
__version__ = "0.1.0"


def map_kernels(folder: Path) -> None:
    """Makes `amft_kernels` the folder's `kernels/`, as an install does (setup.py), for a checkout that was not installed."""
    spec = importlib.machinery.ModuleSpec("amft_kernels", None, is_package=True)
    spec.submodule_search_locations = [str(folder / "kernels")]
    sys.modules["amft_kernels"] = importlib.util.module_from_spec(spec)


_checkout = Path(__file__).parent.parent
_unknown = "amft_kernels" not in sys.modules and importlib.util.find_spec("amft_kernels") is None
if _unknown and (_checkout / "kernels" / "row_math.py").exists():
    map_kernels(_checkout)

_FROM = {"Config": "config", "UserError": "errors"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'amft_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(f"amft_fast.{_FROM.get(name, 'api')}"), name)
