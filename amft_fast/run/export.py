"""`amft-fast export RUN`: a checkpoint, also of a run broken off, as a transformers folder, or its adapters for peft."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError

from amft_fast import config_file
from amft_fast.config import ModelConfig
from amft_fast.engine.parts import Tensors
from amft_fast.errors import UserError
from amft_fast.model import lora
from amft_fast.model.convert import DTYPES
from amft_fast.model.policy import fill, load_model
from amft_fast.rollout.encoder import Encoder, load_encoder
from amft_fast.run import checkpoint

NEWEST = "newest"


def export(
    run: Path,
    which: str = NEWEST,
    dtype: str | None = None,
    adapter: bool = False,
    out: Path | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Writes the policy of a checkpoint of `run` and returns the folder.

    `which`: "newest" (that is whole), "best", or a step. `dtype`: a key of DTYPES; by default that of the base checkpoint, and
    fp32 of adapters. `adapter`: the factors alone, for peft. `out`: by default `export/step-N` in the run's folder. Raises
    UserError for what is not there, or when `out` is.
    """
    if not (run / "config.toml").is_file():
        raise UserError(f"export: {str(run)!r} is not the folder of a run: it has no config.toml")
    cfg = config_file.load(run / "config.toml").model
    if adapter and not cfg.lora.rank:
        raise UserError("--adapter: this run has trained no adapters (model.lora.rank is 0): leave it out")
    path, tensors, step = find(run / "checkpoints", which, say)
    out = out or run / "export" / (path.name + ("-adapter" if adapter else ""))
    if out.exists():
        raise UserError(f"--out: {str(out)!r} is there already: delete it, or take another --out")
    aside = out.with_name(f".{out.name}.part")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        _write(cfg, tensors, dtype, adapter, aside)
        os.replace(aside, out)
    except (OSError, SafetensorError) as e:
        raise UserError(f"--out {str(out)!r} cannot be written: {getattr(e, 'strerror', None) or e}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    say(f"step {step} of {run}, {'adapters' if adapter else 'model'}: {out}")
    return out


def find(folder: Path, which: str, say: Callable[[str], None] = print) -> tuple[Path, Tensors, int]:
    """The checkpoint asked for: its folder, tensors and step. Nothing is moved or repaired: the run may be going on."""
    there = dict(reversed(checkpoint.steps(folder)))
    best = (folder / "best").resolve() if (folder / "best").exists() else None
    names = [*(["best"] if best else []), *map(str, there)]
    if not there:
        raise UserError(f"export: no checkpoint under {str(folder)!r}")
    if which == NEWEST:
        wanted = list(there.values())
    elif which == "best" and best:
        wanted = [best]
    elif which.isdecimal() and int(which) in there:
        wanted = [there[int(which)]]
    else:
        raise UserError(f"--checkpoint: no {which!r} under {str(folder)!r}, which holds {', '.join(names)}")
    for path in wanted:
        try:
            tensors, state = checkpoint.load(path)
            return path, tensors, state["step"]
        except ValueError as e:
            if which != NEWEST:
                raise UserError(f"--checkpoint {which}: {e}; there are {', '.join(names)}") from None
            say(f"checkpoint passed over: {e}")
    raise UserError(f"export: no whole checkpoint under {str(folder)!r}")


def _write(cfg: ModelConfig, tensors: Tensors, dtype: str | None, adapter: bool, folder: Path) -> None:
    # On the CPU and in the masters' type, whatever the run was on.
    plain = {"dtype": "fp32", "attention": "auto", "liger": False, "compile": False, "gradient_checkpointing": False}
    model = load_model(cfg.model_copy(update=plain), torch.device("cpu"))
    trained = (k.removeprefix("param.") for k in tensors if k.startswith("param."))
    try:
        fill(model, ((name, tensors[f"param.{name}"]) for name in trained if not name.startswith("value_head.")))
    except (ValueError, RuntimeError) as e:
        raise UserError(f"export: the checkpoint does not fit model.path {cfg.path!r}: {e}") from None
    if adapter:
        lora.export_adapter(model, cfg.lora, cfg.path, folder, DTYPES[dtype or "fp32"])
        return
    lora.export(model, folder, DTYPES[dtype] if dtype else _own_dtype(cfg.path))
    save_encoder(load_encoder(cfg), folder)


def _own_dtype(path: str) -> torch.dtype:
    """The type that a checkpoint's weights have by its own config."""
    from transformers import AutoConfig

    own = AutoConfig.from_pretrained(path).dtype
    return own if isinstance(own, torch.dtype) else torch.float32


def save_encoder(encoder: Encoder, folder: Path) -> None:
    """What turns texts and pictures into a model's input, beside the model."""
    encoder.tokenizer.save_pretrained(folder)
    if encoder.vision is not None:
        encoder.vision.processor.save_pretrained(folder)
