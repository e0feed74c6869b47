"""Small in-memory parts that fit interfaces.py: a task, a rollout engine, a tokenizer and a model for tests."""

from __future__ import annotations

from pathlib import Path

import torch

from amft_fast import config_file
from amft_fast.config import Config
from amft_fast.interfaces import Completion, Demo, Item, Message, StepResult

# A run of two steps, by task.name or a task of one's own.
SHORT_RUN = """
run = { threads = 1 }
train = { steps = 2, lr = 0.01, prompts_per_step = 2, demos_per_step = 2, method = "fixed" }
rollout = { num_generations = 4, max_new_tokens = 4 }
eval = { every = 0, num_samples = 1 }
log = { to = [] }
checkpoint = { every = 0, export = false }
"""

WORDS = ["a", "b", "c", "d", "e", "f", "yes", "no", "again"]


def word_tokenizer(vocabulary: list[str], marks: list[str], template: str):
    """One token a word; `marks` are the special ones beside <pad>, <eos> and <unk>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", "additional_special_tokens": marks}
    return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=template, **special)


def make_checkpoint(
    folder: Path,
    hidden: int = 16,
    layers: int = 2,
    tie: bool = True,
    seed: int = 0,
    experts: int = 0,
    heads: tuple[int, int] = (2, 1),
    expert_width: int = 12,
    head: int = 8,
) -> Path:
    """A random Qwen3 with a word-level tokenizer, as a transformers folder; with `experts` a Qwen3-MoE that takes two. `heads`:
    of queries, and of keys and values, each `head` wide."""
    from transformers import AutoConfig, AutoModelForCausalLM

    vocabulary = ["<pad>", "<eos>", "<user>", "<answer>", "<unk>", *WORDS]
    template = (
        "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<answer> ' }}{{ m.content }} "
        "{% if m.role == 'assistant' %}<eos> {% endif %}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
    )
    tokenizer = word_tokenizer(vocabulary, ["<user>", "<answer>"], template)
    torch.manual_seed(seed)
    mixture = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": expert_width}
    config = AutoConfig.for_model(
        "qwen3_moe" if experts else "qwen3",
        **(mixture | {"norm_topk_prob": True} if experts else {}),
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=head,
        intermediate_size=2 * hidden,
        max_position_embeddings=256,
        tie_word_embeddings=tie,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config)
    # Far enough from uniform that tests see real differences between tokens.
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.mul_(8)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def copy_run(folder: Path, model: Path, *flags: str) -> Config:
    """Settings of a small run without checkpoints, export and evaluations in between; `flags` add to them."""
    base = [
        *("--run.dir", str(folder), "--model.path", str(model), "--run.threads", "1", "--train.lr", "0.01"),
        *("--train.prompts_per_step", "4", "--train.demos_per_step", "4", "--rollout.max_new_tokens", "4"),
        *("--eval.every", "0", "--checkpoint.every", "0", "--checkpoint.keep_best", "false"),
        *("--checkpoint.export", "false", "--log.to", "[]"),
    ]
    return config_file.load(None, [*base, *flags])


class CopyEpisode:
    """Asked with a word, the policy must answer with it; a wrong answer is told so, up to the task's turns."""

    def __init__(self, task: CopyTask, word: str) -> None:
        self.task, self.word, self.tries = task, word, 0
        self.messages = [Message("user", word)]

    def step(self, text: str) -> StepResult:
        self.tries += 1
        right = self.word in text.split()
        done = right or self.tries == self.task.max_turns
        message = None if done else Message("user", "again")
        return StepResult(message, float(right), done, {"success": right, "words": float(len(text.split()))})


class CopyTask:
    """Repeat the word. Demonstrations answer with the word alone."""

    splits = ("train", "val", "test", "ood")

    def __init__(self, max_turns: int = 1) -> None:
        self.max_turns = max_turns

    def prompts(self, split: str) -> list[Item]:
        words = {"train": "abcd", "val": "ea", "test": "f", "ood": "ef"}[split]
        return [Item(f"{split}/{w}", w) for w in words]

    def demos(self, split: str) -> list[Demo]:
        return [Demo(i.id, (Message("user", i.data),), i.data) for i in self.prompts(split)]

    def start(self, item: Item) -> CopyEpisode:
        return CopyEpisode(self, item.data)


class ScriptedEngine:
    """A rollout engine that answers from a list of token id lists, in turn, and remembers what it was asked."""

    def __init__(self, answers: list[list[int]]) -> None:
        self.answers, self.asked, self.synced = list(answers), [], []

    def generate(self, requests, sampling) -> list[Completion]:
        self.asked += requests
        out = [self.answers.pop(0) for _ in requests]
        stop = set(sampling.stop_token_ids)
        return [Completion(ids, [-0.5] * len(ids), "stop" if ids[-1] in stop else "length", 7) for ids in out]

    def sync(self, named_tensors, version: int) -> None:
        self.synced.append(version)

    def rest(self) -> None: ...

    def health(self) -> str:
        return "ok"

    def close(self) -> None:
        self.answers.clear()
