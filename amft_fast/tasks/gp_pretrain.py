"""Make the demo's base checkpoint: `python -m amft_fast.tasks.gp_pretrain --out configs/demo_base`.

A Qwen3 of 0.15 M parameters with a tokenizer of its own (one token a word, a number or a sign) learns to answer General
Points prompts in the format "formula". It is not shown solutions of problems: a random legal expression over a hand is
labelled with its own value as the target. So it learns to write legal formulas that use the hand, and only roughly to
hit a target, which leaves reinforcement learning something to do.

Hands come from the splits `train` and `ood_train` alone, under both rules for face cards: no multiset of values that a
task with the same seed and shares holds in `val`, `test` or `ood` occurs, in any order or with any target.

Sequences, lengths in tokens: `<bos><user>` hand, rule and target (8-10) `<assistant>` formula (5-11) `= target <eos>`.
Only answers are trained on. Some sequences have two turns, a wrong answer (not trained on) and the verifier's feedback
coming first.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from hashlib import sha256
from itertools import permutations, product
from pathlib import Path

import tokenizers
import torch
import transformers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from amft_fast.tasks.general_points import (
    PROMPT_WORDS,
    GeneralPoints,
    Verdict,
    answer_text,
    feedback_text,
    prompt_text,
)
from amft_fast.tasks.gp_hands import ID_RULE, OOD_RULE, Problem, hands, shuffled_deal

PAD, BOS, EOS, UNK, USER, ASSISTANT = SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>")
SIGNS = ("+", "-", "*", "/", "(", ")", "=")
LARGEST_NUMBER = 99

# The text of a conversation is a prefix of the text of any longer one, so turns can be put together token by token.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant>"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}<user>{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """What a base checkpoint is made from. `two_turns` is the share of sequences with a wrong answer first."""

    num_cards: int = 3
    targets: tuple[int, int] = (1, 40)
    seed: int = 0
    steps: int = 600
    batch_size: int = 256
    lr: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    two_turns: float = 0.1
    hidden_size: int = 64
    num_layers: int = 3


# ----------------------------------------------------------------------------------------------------------- tokenizer


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of a prompt, each number to 99 and each sign; anything else is `<unk>`.

    Decoding puts spaces between tokens, which the verifier passes over. Knows `apply_chat_template`.
    """
    words = (*SPECIALS, *SIGNS, *PROMPT_WORDS, *map(str, range(LARGEST_NUMBER + 1)))
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNK)
    backend = tokenizers.Tokenizer(model)
    pieces = tokenizers.Regex(r"[0-9]+|[A-Za-z]+|[^\s0-9A-Za-z]")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Split(pieces, "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


# ---------------------------------------------------------------------------------------------------------------- data


def allowed_hands(recipe: Recipe) -> dict[str, list[tuple[int, ...]]]:
    """For each rule, the multisets of values that pre-training may show.

    Hands without a value above 10 are allowed under both rules, as far as they are training hands.
    """
    task = GeneralPoints(num_cards=recipe.num_cards, targets=recipe.targets, seed=recipe.seed)
    train = [hand for hand in hands(recipe.num_cards, ID_RULE) if task.assign_split(hand) == "train"]
    other = [hand for hand in hands(recipe.num_cards, OOD_RULE) if task.assign_split(hand) == "ood_train"]
    return {ID_RULE: train, OOD_RULE: train + other}


def leak(base: str, task: object) -> str | None:
    """A sentence when the base checkpoint in the folder `base` was pre-trained on hands that `task` holds out.

    None where nothing leaks, and for a base or a task that this module knows nothing of.
    """
    try:
        made = json.loads((Path(base) / "recipe.json").read_text())["arguments"]
        recipe = Recipe(**{k: made[k] for k in ("num_cards", "targets", "seed")})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not isinstance(task, GeneralPoints) or task.num_cards != recipe.num_cards:
        return None
    seen = {hand for pool in allowed_hands(recipe).values() for hand in pool}
    leaked = sorted(hand for hand in seen if task.assign_split(hand) not in ("train", "ood_train"))
    if not leaked:
        return None
    return (
        f"model.path: {base!r} was pre-trained on {len(leaked)} of the hands that task.general_points.seed {task.seed} and its "
        f"shares hold out: success on val, test and ood says nothing then. Keep seed {recipe.seed} and the default shares, or "
        "make a base of your own with python -m amft_fast.tasks.gp_pretrain"
    )


def all_expressions(numbers: Sequence[int]) -> Iterator[tuple[str, Fraction, int]]:
    """Every expression over the numbers in this order, without superfluous brackets: (text, value, precedence).

    Precedence is 1 for a sum, 2 for a product, 3 for a number.
    """
    if len(numbers) == 1:
        yield str(numbers[0]), Fraction(numbers[0]), 3
    for cut in range(1, len(numbers)):
        for (a, x, p), (b, y, q) in product(all_expressions(numbers[:cut]), all_expressions(numbers[cut:])):
            yield f"{a}+{_wrap(b, q, 1)}", x + y, 1
            yield f"{a}-{_wrap(b, q, 2)}", x - y, 1
            yield f"{_wrap(a, p, 2)}*{_wrap(b, q, 2)}", x * y, 2
            if y:
                yield f"{_wrap(a, p, 2)}/{_wrap(b, q, 3)}", x / y, 2


def _wrap(text: str, precedence: int, needed: int) -> str:
    return text if precedence >= needed else f"({text})"


class Examples:
    """Draws training sequences: token ids, and for each token whether it is trained on."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast):
        self.recipe, self.vocabulary = recipe, tokenizer.get_vocab()
        self.hands = allowed_hands(recipe)
        self.labelled = {hand: _labelled(hand, recipe.targets) for pool in self.hands.values() for hand in pool}
        self.hands = {rule: [hand for hand in pool if self.labelled[hand]] for rule, pool in self.hands.items()}

    def draw(self, rng: random.Random) -> tuple[list[int], list[bool]]:
        """One sequence: a rule, a hand of it, an expression over it, and the cards in any order."""
        rule = rng.choice((ID_RULE, OOD_RULE))
        hand = rng.choice(self.hands[rule])
        formula, target = rng.choice(self.labelled[hand])
        problem = shuffled_deal(hand, target, rule, rng)
        turns = [(USER, prompt_text(problem, "formula"), False)]
        if rng.random() < self.recipe.two_turns:
            turns += self._wrong_turn(problem, rng)
        turns.append((ASSISTANT, answer_text(problem, formula, "formula"), True))
        return self._encode(turns)

    def _wrong_turn(self, problem: Problem, rng: random.Random) -> list[tuple[str, str, bool]]:
        formula, value = rng.choice(self.labelled[tuple(sorted(problem.values))])
        if value == problem.target:
            return []
        feedback = feedback_text(problem, Verdict("no_solution", Fraction(value)), "formula")
        return [(ASSISTANT, answer_text(problem, formula, "formula"), False), (USER, feedback, False)]

    def _encode(self, turns: list[tuple[str, str, bool]]) -> tuple[list[int], list[bool]]:
        words, trained = [BOS], [False]
        for role, text, train in turns:
            content = text.split() + ([EOS] if role == ASSISTANT else [])
            words += [role, *content]
            trained += [False] + [train] * len(content)
        return [self.vocabulary[word] for word in words], trained

    def batch(self, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and labels, both [batch, length], padded on the right; labels are -100 where not trained on."""
        drawn = [self.draw(rng) for _ in range(self.recipe.batch_size)]
        length = max(len(ids) for ids, _ in drawn)
        ids = torch.full((len(drawn), length), self.vocabulary[PAD])
        labels = torch.full_like(ids, -100)
        for row, (tokens, trained) in enumerate(drawn):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, : len(tokens)] = torch.tensor([t if on else -100 for t, on in zip(tokens, trained)])
        return ids, labels


def _labelled(hand: tuple[int, ...], targets: tuple[int, int]) -> list[tuple[str, int]]:
    """Every expression over every order of the hand whose value may be a target, with that value."""
    return [
        (text, int(value))
        for order in sorted(set(permutations(hand)))
        for text, value, _ in all_expressions(order)
        if value.denominator == 1 and targets[0] <= value <= targets[1]
    ]


# ------------------------------------------------------------------------------------------------------------ training


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=3 * recipe.hidden_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=recipe.hidden_size // 4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        use_cache=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def train(recipe: Recipe, report: Callable[[int, float, Qwen3ForCausalLM], None]) -> Qwen3ForCausalLM:
    """Train from nothing; calls `report(step, loss, model)` after each step. Loss in nats a token."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    tokenizer = build_tokenizer()
    examples = Examples(recipe, tokenizer)
    model = build_model(recipe, tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, recipe.warmup_steps, recipe.steps)
    for step in range(1, recipe.steps + 1):
        ids, labels = examples.batch(rng)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(step, loss.item(), model)
    return model.eval()


def save(model: Qwen3ForCausalLM, recipe: Recipe, losses: Sequence[float], folder: Path) -> None:
    """Write the Hugging Face folder and `recipe.json`: how it was made, what was left out, and the weights' hash."""
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    allowed = allowed_hands(recipe)
    listed = sorted({hand for pool in allowed.values() for hand in pool})
    last = losses[-50:]
    record = {
        "command": "python -m amft_fast.tasks.gp_pretrain",
        "arguments": asdict(recipe),
        "parameters": model.num_parameters(),
        "final_loss": round(sum(last) / len(last), 4),
        "data": {
            "what": "random legal expressions over a hand, labelled with their own value as the target",
            "hands": {rule: len(pool) for rule, pool in allowed.items()},
            "hands_sha256": sha256(json.dumps(listed).encode()).hexdigest(),
            "excluded": "every multiset of values in val, test or ood, in any order, under any rule, with any target",
        },
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model_sha256": sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
    }
    (folder / "recipe.json").write_text(json.dumps(record, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m amft_fast.tasks.gp_pretrain", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    for name in ("seed", "steps", "batch_size", "lr", "hidden_size", "num_layers"):
        default = getattr(Recipe, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"[{default}]")
    given = vars(parser.parse_args(arguments))
    folder = given.pop("out")
    recipe, losses = Recipe(**given), []

    def report(step: int, loss: float, _: Qwen3ForCausalLM) -> None:
        losses.append(loss)
        if step % 50 == 0 or step == recipe.steps:
            print(f"step {step}/{recipe.steps}  loss {sum(losses[-50:]) / len(losses[-50:]):.4f}", flush=True)

    torch.set_num_threads(1)  # sums then come out alike whatever the number of cores; at this size more gain little
    model = train(recipe, report)
    folder.mkdir(parents=True, exist_ok=True)
    save(model, recipe, losses, folder)
    print(f"wrote {folder}", file=sys.stderr)


if __name__ == "__main__":
    main()
