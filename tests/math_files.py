"""Where the real files of the mathematics tests are: the folder AMFT_MATH_DATA, or ../shared/data/math from the repository."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get("AMFT_MATH_DATA") or ROOT.parent / "shared" / "data" / "math")
FILES = ("aime24.jsonl", "amc23.jsonl", "gsm8k_test.jsonl", "luffy_arc_c.parquet", "luffy_valid_all.parquet")

needs_files = pytest.mark.skipif(
    not all((FOLDER / name).is_file() for name in FILES),
    reason=f"needs {', '.join(FILES)} in the folder that AMFT_MATH_DATA names (or ../shared/data/math)",
)
