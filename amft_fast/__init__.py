"""amft-fast: single-stage SFT + RL fine-tuning with a learned mixing weight. Importing it imports no torch."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

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
