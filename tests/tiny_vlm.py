"""Tiny random vision-language models for tests, as transformers folders: real architectures with next to no parameters."""

from __future__ import annotations

from pathlib import Path

import torch
from fakes import word_tokenizer

WORDS = ["a", "b", "c", "d", "e", "f", "yes", "no", "again"]
SEE, SEEN, SHUT, FILM = (
    "<|vision_start|>",
    "<|image_pad|>",
    "<|vision_end|>",
    "<|video_pad|>",
)  # as vLLM has them for Qwen
SPECIAL = ["<pad>", "<eos>", "<user>", "<answer>", "<unk>", SEE, SEEN, SHUT]
TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<answer> ' }}"
    "{% if m.content is string %}{{ m.content }} {% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}" + f"{SEE} {SEEN} {SHUT} " + "{% else %}{{ c.text }} {% endif %}{% endfor %}{% endif %}"
    "{% if m.role == 'assistant' %}<eos> {% endif %}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)
IMAGE = SPECIAL.index(SEEN)
# An mllama's head does not know the image token, which comes last.
MLLAMA_WORDS = [w for w in SPECIAL if w != SEEN] + WORDS + [SEEN]
KINDS = ("qwen2_5_vl", "qwen3_vl", "mllama")


def make_vlm(folder: Path, kind: str, seed: int = 0, head: int = 8) -> Path:
    """A checkpoint of this kind, far enough from uniform that tests see differences between tokens and pictures.

    `head`: width of a Qwen's heads for text."""
    torch.manual_seed(seed)
    model, processor = _mllama() if kind == "mllama" else {"qwen2_5_vl": _qwen2_5, "qwen3_vl": _qwen3}[kind](head)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2:
                p.mul_(8)
            if name.endswith("_gate") or (".gate" in name and p.numel() == 1):  # closed in a new mllama
                p.fill_(0.7)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    words = [*SPECIAL, *WORDS, FILM] if kind != "mllama" else MLLAMA_WORDS
    word_tokenizer(words, ["<user>", "<answer>", SEE, SEEN, SHUT], TEMPLATE).save_pretrained(folder)
    return folder


def _text(**more) -> dict:
    sizes = {
        "vocab_size": len(SPECIAL) + len(WORDS) + 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    return sizes | heads | {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1} | more


def _qwen_processor():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        patch_size=4, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 64, "longest_edge": 4096}
    )


def _qwen_ids() -> dict:
    at = SPECIAL.index
    return {
        "image_token_id": IMAGE,
        "video_token_id": len(SPECIAL) + len(WORDS),
        "vision_start_token_id": at(SEE),
        "vision_end_token_id": at(SHUT),
        "tie_word_embeddings": False,
    }


def _qwen_text(head: int, **more) -> dict:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [head // 4, head // 8, head // 8]}
    return _text(hidden_size=2 * head, rope_parameters=rope | more)


def _qwen_vision(head: int) -> dict:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 2 * head}
    return sizes | {"depth": 2, "num_heads": 2, "patch_size": 4}


def _qwen2_5(head: int):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = _qwen_vision(head) | {"window_size": 16, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(text_config=_qwen_text(head), vision_config=vision, **_qwen_ids())
    return Qwen2_5_VLForConditionalGeneration(config), _qwen_processor()


def _qwen3(head: int):
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = _qwen_vision(head) | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    text = _qwen_text(head, mrope_interleaved=True) | {"head_dim": head}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **_qwen_ids())
    return Qwen3VLForConditionalGeneration(config), _qwen_processor()


def _mllama():
    from transformers import MllamaConfig, MllamaForConditionalGeneration
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    size = {"height": 16, "width": 16}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        "max_num_tiles": 2,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 32,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }
    image = len(MLLAMA_WORDS) - 1
    text = _text() | {"vocab_size": image, "num_hidden_layers": 3, "cross_attention_layers": [1], "bos_token_id": 3}
    config = MllamaConfig(text_config=text, vision_config=vision, image_token_index=image)
    return MllamaForConditionalGeneration(config), MllamaImageProcessorPil(size=size, max_image_tiles=2)
