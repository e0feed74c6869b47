"""A GGUF of a random Llama of two layers, written by the package gguf: its weights in fp32 or Q8_0, a tokenizer of bytes."""

import numpy as np

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HIDDEN, MLP, LAYERS, HEADS, KV = 64, 96, 2, 4, 2


def byte_tokens():
    """The 256 characters that stand for bytes in a byte-level vocabulary, in the order of the bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [char for _, char in sorted(bytes_to_unicode().items())]


def write_gguf(path, seed=0, quantized=False, without=(), nan=False):
    """Returns the weights as written, by their GGUF names. `without` leaves tensors out, `nan` spoils one."""
    import gguf

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *byte_tokens(), "th"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(special) + [1] * (len(tokens) - len(special)))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)

    rng, size = np.random.default_rng(seed), HIDDEN // HEADS
    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm": (HIDDEN,), f"blk.{i}.ffn_norm": (HIDDEN,),
            f"blk.{i}.attn_q": (HIDDEN, HIDDEN), f"blk.{i}.attn_output": (HIDDEN, HIDDEN),
            f"blk.{i}.attn_k": (KV * size, HIDDEN), f"blk.{i}.attn_v": (KV * size, HIDDEN),
            f"blk.{i}.ffn_gate": (MLP, HIDDEN), f"blk.{i}.ffn_up": (MLP, HIDDEN), f"blk.{i}.ffn_down": (HIDDEN, MLP),
        }  # fmt: skip
    written = {}
    for name, shape in shapes.items():
        values = rng.normal(0, 0.1, shape).astype(np.float32)
        if nan and name == "output_norm":
            values[0] = np.nan
        kind = gguf.GGMLQuantizationType.Q8_0
        stored = gguf.quantize(values, kind) if quantized and len(shape) == 2 else values
        written[name] = gguf.dequantize(stored, kind) if stored is not values else values
        if name not in without:
            writer.add_tensor(f"{name}.weight", stored, raw_dtype=kind if stored is not values else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written
