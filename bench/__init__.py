"""Measurements: `python -m bench NAME`. Importing it makes `amft_kernels` this checkout's `kernels/`, installed or not."""

import sys
from pathlib import Path

from amft_fast import map_kernels

ROOT = Path(__file__).parent.parent

# What is measured has to be the code whose commit the results name, whatever is installed.
if "amft_kernels" not in sys.modules:
    map_kernels(ROOT)
