"""What a base checkpoint says of itself, and what can be wrong with one: each is one sentence that names `model.path`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from amft_fast.config import ModelConfig
from amft_fast.errors import UserError


def check_path(path: str) -> None:
    """Raises UserError for a path that is not set, or looks like a folder and holds no checkpoint."""
    if not path:
        raise UserError("model.path is not set: give a transformers checkpoint folder or a hub name")
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not (Path(path).expanduser() / "config.json").exists():
        raise UserError(f"model.path: {path!r} is not a transformers checkpoint: it has no config.json")


def unloadable(path: str, what: str, error: Exception) -> UserError:
    """The sentence for what a loader raised."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    plain = isinstance(error, OSError | ValueError | ImportError) and said
    text = said if plain else f"{type(error).__name__}: {said}".rstrip(": ")
    return UserError(f"model.path: {what} {path!r} could not be loaded: {text[:400]}")


def read_config(cfg: ModelConfig) -> Any:
    """The checkpoint's transformers configuration, as it lies there. Raises UserError."""
    from transformers import AutoConfig

    check_path(cfg.path)
    try:
        return AutoConfig.from_pretrained(cfg.path, trust_remote_code=False)
    except Exception as e:  # a damaged file may make any of the layers below raise what it likes
        raise unloadable(cfg.path, "the configuration of", e) from None


def longest_context(cfg: ModelConfig) -> int | None:
    """The most tokens that the model has positions for, by the settings or the checkpoint; None where it names no bound."""
    if cfg.max_position_embeddings is not None:
        return cfg.max_position_embeddings
    found = getattr(read_config(cfg).get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def generation_stops(path: str, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer by the checkpoint's generation_config.json: many end turns in one that is not eos.

    Only special tokens count: configurations written by default name ids that are words of a small vocabulary.
    """
    from transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(path).eos_token_id
    except Exception as e:
        if (Path(path) / "generation_config.json").exists():
            raise unloadable(path, "generation_config.json of", e) from None
        return ()
    ids = found if isinstance(found, list | tuple) else [found]
    return tuple(i for i in ids if isinstance(i, int) and i in tokenizer.added_tokens_decoder)


def check_vocabulary(cfg: ModelConfig, tokenizer: Any) -> None:
    """Raises UserError when the tokenizer knows no words, or has ids that the model's embedding has no row for."""
    config = read_config(cfg)
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if rows is not None and config.model_type == "mllama":
        rows += 8  # its embedding has room for the image token behind the vocabulary
    vocabulary = tokenizer.get_vocab()
    # Of a folder without tokenizer files transformers makes one of special tokens alone.
    if set(vocabulary.values()) <= set(tokenizer.added_tokens_decoder):
        raise UserError(
            f"model.path: the tokenizer of {cfg.path!r} could not be loaded: there are no tokenizer files (tokenizer.json or "
            "its like), copy them from the model that this one was made of"
        )
    # Special tokens that nothing writes do no harm: transformers adds some by itself, and texts never become any.
    added, template = tokenizer.added_tokens_decoder, str(tokenizer.chat_template)
    own = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    written = [i for i in vocabulary.values() if i not in added or not added[i].special or added[i].content in template]
    largest = max([*written, *(i for i in own if i is not None)])
    if isinstance(rows, int) and largest >= rows:
        raise UserError(
            f"model.path: the tokenizer of {cfg.path!r} counts up to token {largest} "
            f"({tokenizer.convert_ids_to_tokens(largest)!r}), and the model's embedding has {rows} rows: take the tokenizer "
            "that belongs to it, or resize the embedding first (model.resize_token_embeddings)"
        )


def check_whole(path: str, info: dict[str, Any]) -> None:
    """Raises UserError for tensors that the checkpoint lacks, by what from_pretrained reports: they would be drawn anew."""
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise UserError(
            f"model.path: {path!r} lacks {len(missing)} of the model's tensors ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}), which would be random: it is damaged, or of another architecture"
        )
    wrong = sorted(str(key) for key in info.get("mismatched_keys") or ())
    if wrong:
        raise UserError(f"model.path: tensors of {path!r} have another shape than its config.json says: {wrong[0]}")


@torch.no_grad()
def check_finite(path: str, model: nn.Module) -> None:
    """Raises UserError that names the first parameter with a NaN or an infinity. Those cut away (ZeRO-3) are passed over."""
    named = [(name, p) for name, p in model.named_parameters() if p.numel() and p.is_floating_point()]
    if not named:
        return
    # NaN and infinity both come through as the sum of the extremes, which takes no copy of the parameter.
    sums = torch.stack([sum(p.aminmax()).float() for _, p in named])
    bad = (~sums.isfinite()).nonzero().flatten().tolist()
    for i in bad:
        name, p = named[i]
        if not p.isfinite().all():
            count = int((~p.isfinite()).sum())
            raise UserError(
                f"model.path: {name} of {path!r} holds {count} values that are NaN or infinite: the checkpoint is damaged"
            )
