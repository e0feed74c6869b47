"""The first half hour on a GPU: three commands, each of which fits ten minutes and comes back with three files.

    python3 bench/first_gpu.py first  OUT    # the machine's rates, the marked tests, the loss head at its core shape, the probe
    python3 bench/first_gpu.py why    OUT    # its products and its row kernel, each by itself; more shapes; counters
    python3 bench/first_gpu.py system OUT    # training steps, rollouts, a demo run, the sanitizer

Runs from a bare copy of the tree, whatever the folder it is called in. AMFT_COMMIT names the commit where there is no .git.
`step`, `rollout` and `demo` need transformers and pydantic; wheels of pydantic, pydantic-core, pydantic-settings,
annotated-types, typing-inspection and python-dotenv are 5 MB to carry along. A fourth word, cpu, rehearses.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGETS_S = {"first": 470.0, "why": 470.0, "system": 530.0}


def main(argv: list[str]) -> int:
    """As `bench gpu`; 2 for a wrong call."""
    if len(argv) not in (2, 3) or argv[0] not in BUDGETS_S:
        print(__doc__, file=sys.stderr)
        return 2
    sys.path.insert(0, str(ROOT))
    from bench import gpu

    name, out, *device = argv
    arguments = [name, "--out", out, "--budget", str(BUDGETS_S[name])]
    return gpu.main(arguments + (["--device", *device] if device else []))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
