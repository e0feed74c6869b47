"""What the makers of tiny base checkpoints share: a tokenizer of words, a small Qwen3, sequences of turns, a training loop.

`general_points.pretrain` and `virl.pretrain` say what their model is shown; the demos in `configs/` start from what they write.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PAD, BOS, EOS, UNK, USER, ASSISTANT = SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>")

# The text of a conversation is a prefix of the text of any longer one, so turns can be put together token by token.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant>"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}<user>{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)

Turn = tuple[str, str, bool]  # USER or ASSISTANT, text, whether it is trained on


@dataclass(frozen=True)
class Training:
    """The part of a recipe that the training loop reads."""

    seed: int = 0
    steps: int = 600
    lr: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01


@dataclass(frozen=True)
class WordRecipe(Training):
    """A recipe of a model in words (`tiny_model`), trained on sequences of `Examples`."""

    batch_size: int = 256
    hidden_size: int = 64
    num_layers: int = 3


def word_tokenizer(words: Iterable[str], max_length: int = 256) -> PreTrainedTokenizerFast:
    """One token for each of these words, numbers and signs; anything else is `<unk>`.

    Decoding puts spaces between tokens, which verifiers pass over. Knows `apply_chat_template`.
    """
    pieces = tokenizers.Regex(r"[0-9]+|[A-Za-z]+|[^\s0-9A-Za-z]")
    split = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Split(pieces, "isolated")]
    )
    return _tokenizer(words, split, None, max_length)


def piece_tokenizer(pieces: Sequence[str], max_length: int = 256) -> PreTrainedTokenizerFast:
    """One token for each of these pieces of text, spaces and all, of those that fit the longest; anything else is `<unk>`.

    Decoding puts them together as they are. Knows `apply_chat_template`.
    """
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_any_of(pieces)), "isolated")
    return _tokenizer(pieces, split, tokenizers.decoders.Fuse(), max_length)


def split_pieces(pieces: Sequence[str]) -> Callable[[str], list[str]]:
    """What cuts a text as `piece_tokenizer` does; what is no piece is left out."""
    return re.compile(_any_of(pieces)).findall


def _any_of(pieces: Sequence[str]) -> str:
    return "|".join(re.escape(piece) for piece in sorted(pieces, key=len, reverse=True))


def _tokenizer(words: Iterable[str], split: Any, decoder: Any, max_length: int) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate((*SPECIALS, *words))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNK))
    backend.pre_tokenizer = split
    if decoder is not None:
        backend.decoder = decoder
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )


def encode_turns(
    turns: Iterable[Turn], vocabulary: dict[str, int], split: Callable[[str], list[str]] = str.split
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, as the chat template writes it, and for each whether it is trained on; `split` cuts a text
    into what the vocabulary has."""
    words, trained = [BOS], [False]
    for role, text, train in turns:
        content = split(text) + ([EOS] if role == ASSISTANT else [])
        words += [role, *content]
        trained += [False] + [train] * len(content)
    return [vocabulary[word] for word in words], trained


def pad_rows(drawn: Sequence[tuple[list[int], list[bool]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both [batch, length], padded on the right; labels are -100 where not trained on."""
    length = max(len(ids) for ids, _ in drawn)
    ids = torch.full((len(drawn), length), pad)
    labels = torch.full_like(ids, -100)
    for row, (tokens, trained) in enumerate(drawn):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, : len(tokens)] = torch.tensor([t if on else -100 for t, on in zip(tokens, trained)])
    return ids, labels


class Examples:
    """Draws training sequences in words; a subclass says what one is."""

    def __init__(self, recipe: WordRecipe, tokenizer: PreTrainedTokenizerFast) -> None:
        self.recipe, self.vocabulary = recipe, tokenizer.get_vocab()

    def draw(self, rng: random.Random) -> tuple[list[int], list[bool]]:
        """The token ids of one sequence, and for each whether it is trained on."""
        raise NotImplementedError

    def batch(self, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and labels, both [batch, length], padded on the right; labels are -100 where not trained on."""
        return pad_rows([self.draw(rng) for _ in range(self.recipe.batch_size)], self.vocabulary[PAD])


def tiny_model(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_layers: int, max_length: int = 256
) -> Qwen3ForCausalLM:
    """A Qwen3 with new parameters, from torch's own generator."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        use_cache=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def fit(
    model: Qwen3ForCausalLM,
    recipe: Training,
    draw_batch: Callable[[], tuple[torch.Tensor | dict[str, Any], torch.Tensor]],
    report: Callable[[int, float, Qwen3ForCausalLM], None],
    stop: int | None = None,
) -> Qwen3ForCausalLM:
    """Trains on `recipe.steps` batches of ids (or all arguments of the model's forward) and labels; `report(step, loss,
    model)` after each. Loss in nats a token.

    `stop` ends the training early, with the learning rate still that of a run of `recipe.steps`.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, recipe.warmup_steps, recipe.steps)
    for step in range(1, (stop or recipe.steps) + 1):
        ids, labels = draw_batch()
        arguments = ids if isinstance(ids, dict) else {"input_ids": ids}
        logits = model(**arguments, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(step, loss.item(), model)
    return model.eval()


def save(
    folder: Path,
    module: str,
    recipe: Training,
    model: nn.Module,
    readers: Iterable[Any],
    losses: Sequence[float],
    data: dict[str, Any],
    **more: Any,
) -> None:
    """Writes the Hugging Face folder (`readers`: tokenizer, processor) and `recipe.json`: how it was made, on what `data`, by
    which versions, and the weights' hash."""
    model.save_pretrained(folder)
    for reader in readers:
        reader.save_pretrained(folder)
    last = losses[-50:]
    record = {
        "command": f"python -m amft_fast.tasks.{module}",
        "arguments": asdict(recipe),
        **more,
        "parameters": model.num_parameters(),
        "final_loss": round(sum(last) / len(last), 4),
        "data": data,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model_sha256": weights_hash(folder),
    }
    (folder / "recipe.json").write_text(json.dumps(record, indent=2) + "\n")


def weights_hash(folder: Path) -> str:
    return sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def command_line(module: str, purpose: str, recipe: type, names: Iterable[str]) -> argparse.ArgumentParser:
    """`--out` and a flag for each of these fields of the recipe, with the recipe's defaults."""
    parser = argparse.ArgumentParser(prog=f"python -m amft_fast.tasks.{module}", description=purpose.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    for name in names:
        default = getattr(recipe, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"[{default}]")
    return parser


def make(
    given: dict[str, Any],
    recipe_type: type,
    train: Callable[[Any, Callable[[int, float, nn.Module], None]], nn.Module],
    save: Callable[[nn.Module, Any, list[float], Path], None],
    every: int = 50,
) -> None:
    """Trains by the recipe that a command line gave, on one thread, prints the mean loss of the last `every` steps as it goes,
    and saves into the folder `out`."""
    folder = given.pop("out")
    recipe = recipe_type(**given)
    steps = getattr(recipe, "stop", recipe.steps)
    losses: list[float] = []

    def report(step: int, loss: float, _: nn.Module) -> None:
        losses.append(loss)
        if step % every == 0 or step == steps:
            print(f"step {step}/{steps}  loss {sum(losses[-every:]) / len(losses[-every:]):.4f}", flush=True)

    torch.set_num_threads(1)  # sums then come out alike whatever the number of cores; at this size more gain little
    model = train(recipe, report)
    folder.mkdir(parents=True, exist_ok=True)
    save(model, recipe, losses, folder)
    print(f"wrote {folder}", file=sys.stderr)
