"""Make the base of the demo with pictures:
`python -m amft_fast.tasks.general_points.vision_pretrain --out configs/demo_gp_vl_base`.

A Qwen3-VL of 0.2 M parameters learns to read small cards and to answer with them and a formula. Its language model begins as
the text demo's base (`pretrain`), its vision tower and the tokens that only it has begin anew. First the tower alone learns
to say of a rank what the language model's embedding of its word says (`align_steps`, next to no time), then all of it learns
to answer. As in `pretrain` it is not shown solutions of problems: a random legal expression over a hand is labelled with
its own value as the target. Cards are shown in black suits alone, and no multiset of values that a task with the same seed
and shares holds out occurs.

A sequence: `<bos><user><see>` 6 image tokens `</see>` rule and target `<assistant>` cards `formula` formula `= target <eos>`.
Only answers are trained on. Every picture of a batch is shown with several targets.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from amft_fast.config import GeneralPointsConfig
from amft_fast.model.vision import Vision
from amft_fast.rollout.encoder import Encoder
from amft_fast.tasks import tiny_base
from amft_fast.tasks.general_points import pretrain
from amft_fast.tasks.general_points.cards import BLACK_SUITS, RANKS, table_image
from amft_fast.tasks.general_points.hands import ID_RULE, OOD_RULE, shuffled_deal
from amft_fast.tasks.general_points.task import PROMPT_WORDS
from amft_fast.tasks.general_points.vision import GeneralPointsVision

SEE, IMAGE, SEEN = EYES = ("<see>", "<image>", "</see>")
CARD_SIZE, PATCH, MERGE = (16, 32), 8, 2  # a card is two image tokens: its rank and its suit
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant>"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}<user>{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<see><image></see>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True)
class Recipe(tiny_base.Training):
    """What a base checkpoint is made from. A batch holds `pictures` different ones, each with `targets_each` targets."""

    num_cards: int = 3
    targets: tuple[int, int] = (1, 40)
    align_steps: int = 60
    """In which the tower alone learns to say the cards."""
    steps: int = 150
    pictures: int = 20
    targets_each: int = 3
    """Of a picture."""
    warmup_steps: int = 20
    vision_size: int = 48
    vision_layers: int = 1


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of prompts and answers, as in `pretrain`, and those around an image."""
    numbers = map(str, range(pretrain.LARGEST_NUMBER + 1))
    tokenizer = tiny_base.word_tokenizer((*pretrain.SIGNS, *PROMPT_WORDS, "cards", *numbers))
    tokenizer.add_special_tokens({"additional_special_tokens": [tiny_base.USER, tiny_base.ASSISTANT, *EYES]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_processor() -> Qwen2VLImageProcessorPil:
    """Cuts pictures into patches, at their own size."""
    return Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=1,
        size={"shortest_edge": (PATCH * MERGE) ** 2, "longest_edge": 2**18},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, text_base: Path) -> Qwen3VLForConditionalGeneration:
    """A Qwen3-VL whose language model is the text base, word by word; everything else is new, from torch's generator."""
    text = AutoModelForCausalLM.from_pretrained(text_base, dtype=torch.float32)
    keep = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    half = text.config.head_dim // 2
    sections = [half - 2 * (half // 3), half // 3, half // 3]
    rope = {"rope_type": "default", "rope_theta": text.config.rope_parameters["rope_theta"], "mrope_section": sections}
    language = {name: getattr(text.config, name) for name in keep} | {
        "vocab_size": len(tokenizer),
        "rms_norm_eps": text.config.rms_norm_eps,
        "max_position_embeddings": 256,
        "rope_parameters": rope | {"mrope_interleaved": True},
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": recipe.vision_layers,
        "hidden_size": recipe.vision_size,
        "intermediate_size": 2 * recipe.vision_size,
        "num_heads": 2,
        "patch_size": PATCH,
        "temporal_patch_size": 1,
        "spatial_merge_size": MERGE,
        "out_hidden_size": text.config.hidden_size,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [],
    }
    tokens = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in _TOKENS.items()}
    config = Qwen3VLConfig(text_config=language, vision_config=vision, tie_word_embeddings=True, **tokens)
    model = Qwen3VLForConditionalGeneration(config)
    _take_language(model, text, tokenizer, AutoTokenizer.from_pretrained(text_base))
    return model


_TOKENS = {"image": IMAGE, "video": tiny_base.UNK, "vision_start": SEE, "vision_end": SEEN}


@torch.no_grad()
def _take_language(model: nn.Module, text: nn.Module, tokenizer, theirs) -> None:
    """Copies the layers, and the embedding of every word that both know."""
    own = model.model.language_model
    layers = {k: v for k, v in text.model.state_dict().items() if not k.startswith("embed_tokens")}
    missing, unknown = own.load_state_dict(layers, strict=False)
    if unknown or missing != ["embed_tokens.weight"]:
        raise ValueError(f"text_base must be a Qwen3 that fits, got {unknown or missing[:2]} too few or too many")
    for word, i in theirs.get_vocab().items():
        own.embed_tokens.weight[tokenizer.get_vocab()[word]] = text.model.embed_tokens.weight[i]


class Examples:
    """Draws batches: arguments of the model's forward, and labels."""

    def __init__(self, recipe: Recipe, encoder: Encoder):
        self.recipe, self.encoder = recipe, encoder
        self.rank_tokens = [encoder.tokenizer.get_vocab()[rank] for rank in RANKS]
        self.task = GeneralPointsVision(
            GeneralPointsConfig(
                num_cards=recipe.num_cards,
                targets=recipe.targets,
                answer_format="formula",
                seed=recipe.seed,
                card_size=CARD_SIZE,
                card_margin=0,
            )
        )
        allowed = pretrain.allowed_hands(recipe.num_cards, recipe.seed)
        self.labelled = {h: pretrain.labelled(h, recipe.targets) for pool in allowed.values() for h in pool}
        self.hands = {rule: [h for h in pool if self.labelled[h]] for rule, pool in allowed.items()}

    def draw(self, rng: random.Random) -> list[tuple[list[int], list[bool], tuple[Any, ...]]]:
        """Sequences over one picture: (ids, whether each is trained on, images)."""
        rule = rng.choice((ID_RULE, OOD_RULE))
        hand = rng.choice(self.hands[rule])
        dealt = shuffled_deal(hand, 0, rule, rng)
        dealt = replace(dealt, suits=tuple(rng.choice(BLACK_SUITS) for _ in hand))
        out = []
        for _ in range(self.recipe.targets_each):
            formula, target = rng.choice(self.labelled[hand])
            problem = replace(dealt, target=target)
            messages = self.task.opening(problem)
            prompt = self.encoder.prompt(messages)
            answer = self.encoder.response(self.task.answer(problem, formula))
            out.append((prompt + answer, [False] * len(prompt) + [True] * len(answer), messages[0].images))
        return out

    def cards(self, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Pixels and grids of as many pictures as a batch has, and the token of each card's rank, in the cards' order."""
        pixels, words = [], []
        vocabulary = self.encoder.tokenizer.get_vocab()
        for _ in range(self.recipe.pictures):
            ranks = tuple(rng.choice(RANKS) for _ in range(self.recipe.num_cards))
            suits = tuple(rng.choice(BLACK_SUITS) for _ in ranks)
            pixels.append(self.encoder.vision.pixels(table_image(ranks, suits, CARD_SIZE)))
            words += [vocabulary[rank] for rank in ranks]
        values, grids = (np.concatenate([p[k] for p in pixels]) for k in ("pixel_values", "image_grid_thw"))
        return torch.from_numpy(values), torch.from_numpy(grids), words

    def batch(self, rng: random.Random) -> tuple[list, torch.Tensor]:
        """(rows of ids and images, labels [batch, length], -100 where not trained on)."""
        drawn = [row for _ in range(self.recipe.pictures) for row in self.draw(rng)]
        _, labels = tiny_base.pad_rows([(ids, trained) for ids, trained, _ in drawn], 0)
        return [(torch.tensor(ids).numpy(), images) for ids, _, images in drawn], labels


def align(model: Qwen3VLForConditionalGeneration, recipe: Recipe, examples: Examples, rng: random.Random) -> float:
    """Teaches the tower alone: a card's first token is to be its rank's embedding, its second nothing. The last loss."""
    tower, words = model.model.visual, model.model.language_model.embed_tokens.weight.detach()
    optimizer = torch.optim.AdamW(tower.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    loss = torch.zeros(())
    for _ in range(recipe.align_steps):
        pixels, grids, ranks = examples.cards(rng)
        seen = tower(pixels, grid_thw=grids).pooler_output.view(recipe.pictures, 2, recipe.num_cards, -1)
        wanted = torch.stack(
            [words[ranks].view(recipe.pictures, recipe.num_cards, -1), torch.zeros_like(seen[:, 0])], 1
        )
        loss = (seen - wanted).square().sum(-1).mean() / words[examples.rank_tokens].square().sum(-1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return loss.item()


def train(
    recipe: Recipe, text_base: Path, report: Callable[[int, float, nn.Module], None]
) -> Qwen3VLForConditionalGeneration:
    """Train from the text base; calls `report(step, loss, model)` after each step. Loss in nats a token."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    tokenizer = build_tokenizer()
    model = build_model(recipe, tokenizer, text_base)
    vision = Vision(build_processor(), model.config, tokenizer.pad_token_id)
    examples = Examples(recipe, Encoder(tokenizer, vision))

    align(model, recipe, examples, rng)

    def draw_batch() -> tuple[dict[str, Any], torch.Tensor]:
        rows, labels = examples.batch(rng)
        inputs = vision.inputs(rows, torch.device("cpu"), pad=tokenizer.pad_token_id)
        return vision.arguments(model.model, inputs), labels

    return tiny_base.fit(model, recipe, draw_batch, report)


def save(model: nn.Module, recipe: Recipe, text_base: Path, losses: Sequence[float], folder: Path) -> None:
    """Writes the folder, with what was left out of its data."""
    data = {
        "what": "pictures of hands in black suits; random legal expressions over them, labelled with their own value",
        "excluded": "every multiset of values in val, test or ood, in any order, under any rule or target; red suits",
    }
    readers = [build_tokenizer(), build_processor()]
    base = tiny_base.weights_hash(text_base)
    module = "general_points.vision_pretrain"
    tiny_base.save(folder, module, recipe, model, readers, losses, data, text_base_sha256=base)


def main(arguments: Sequence[str] | None = None) -> None:
    names = ("seed", "align_steps", "steps", "pictures", "targets_each", "lr", "vision_size", "vision_layers")
    parser = tiny_base.command_line("general_points.vision_pretrain", __doc__, Recipe, names)
    parser.add_argument("--text-base", type=Path, default=Path("configs/demo_base"), help="[configs/demo_base]")
    given = vars(parser.parse_args(arguments))
    text_base = given.pop("text_base")

    def train_on_base(recipe: Recipe, report: Callable[[int, float, nn.Module], None]) -> nn.Module:
        return train(recipe, text_base, report)

    def save_with_base(model: nn.Module, recipe: Recipe, losses: list[float], folder: Path) -> None:
        save(model, recipe, text_base, losses, folder)

    tiny_base.make(given, Recipe, train_on_base, save_with_base, every=25)


if __name__ == "__main__":
    main()
