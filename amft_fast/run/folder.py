"""The folder of a run: made, taken up again, or refused; and what it says of the machine."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path

import torch
import transformers

from amft_fast import __version__
from amft_fast.config import Config
from amft_fast.config_file import to_toml
from amft_fast.doctor.installed import cpu_name
from amft_fast.errors import UserError


def prepare_folder(cfg: Config, resume: bool) -> Path:
    """The run's folder. An earlier run there is an error, unless it is resumed or may be overwritten."""
    folder = Path(cfg.run.dir)
    try:
        if (folder / "metrics.jsonl").exists() and not resume:
            if not cfg.run.overwrite:
                raise UserError(
                    f"run.dir {str(folder)!r} holds an earlier run: go on with --resume, take another --run.dir, or delete it "
                    "with --run.overwrite"
                )
            for name in ("checkpoints", "tb", "model"):
                shutil.rmtree(folder / name, ignore_errors=True)
            for name in ("metrics.jsonl", "evals.jsonl", "samples.jsonl", "summary.json", "report.html", "report.png"):
                (folder / name).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.toml").write_text(to_toml(cfg))
        (folder / "environment.json").write_text(json.dumps(environment(), indent=1))
    except OSError as e:
        raise UserError(f"run.dir {str(folder)!r} cannot be written: {e.strerror}") from None
    return folder


def environment() -> dict[str, str]:
    """Versions and device, for the record."""

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return {
        "amft_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device,
        "threads": str(torch.get_num_threads()),
    }
