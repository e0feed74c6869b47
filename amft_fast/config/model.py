"""The model, its adapters, and the processes that it is trained by."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from amft_fast.config.kinds import File, Section, Tokens


class LoraConfig(Section):
    """Training of small factors beside frozen linear layers (peft); off at rank 0."""

    rank: int = Field(0, ge=0, le=65536)
    """Rank of the factors; 0 trains the weights themselves."""
    alpha: float | None = Field(None, gt=0)
    """The factors' product counts alpha / rank times; default: 2 rank."""
    targets: list[str] = ["all-linear"]
    """Names of the layers that get factors (q_proj, ..., embed_tokens where it is not tied); all-linear: all linear ones but
    the output embedding."""


class ModelConfig(Section):
    """The policy: a transformers causal language model."""

    path: File = ""
    """Folder of a transformers checkpoint, or a hub name. Relative folders are looked up from the working directory,
    then from the config file's folder."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the parameters in the forward pass; auto: bf16 on CUDA (with fp32 master weights), fp32 on CPU."""
    rope_theta: float | None = Field(None, gt=0)
    """Base of the rotary position embedding, instead of the checkpoint's (40000 stretches Qwen2.5-Math to 16 k tokens)."""
    max_position_embeddings: Tokens | None = None
    """Longest context, instead of the checkpoint's."""
    vision: Literal["trained", "projector", "frozen"] = "trained"
    """What of a vision-language model's eyes is trained. projector: what carries the tower's output into the language model,
    but not the tower; frozen: neither."""
    max_pixels: int | None = Field(None, ge=1)
    """Images with more pixels are made smaller (models with image tokens by size: Qwen-VL); default: the checkpoint's."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4"] = "auto"
    """Attention in training; auto: the first that is there of FlashAttention 4, 3, 2, torch's varlen, SDPA (attention.py)."""
    gradient_checkpointing: bool | Literal["selective"] = False
    """Recompute each layer's activations in the backward pass; selective: all but matrix products and attention."""
    offload_activations: bool = False
    """Keep the activations that the backward pass needs in host memory (GPU)."""
    mlp_tile: Tokens | None = None
    """Tokens that the MLP of a layer takes at a time, recomputed in the backward pass (DeepSpeed's TiledMLP); default: all."""
    liger: bool | None = None
    """Liger's kernels for norms, rotary embedding and MLP; default: on a GPU where liger-kernel is installed."""
    compile: bool = False
    """Compile each layer with torch.compile; rollouts run it as it is."""
    router_aux_coef: float = Field(0.0, ge=0)
    """Weight of the loss that keeps the experts of a mixture evenly loaded (model/experts.py); Qwen3 says 0.001."""
    lora: LoraConfig = LoraConfig()


class EngineConfig(Section):
    """How parameters are updated."""

    kind: Literal["local", "deepspeed"] = "local"
    """local: one process; deepspeed: ZeRO over all processes that torchrun or the deepspeed launcher starts."""
    zero_stage: int = Field(3, ge=1, le=3)
    """What deepspeed cuts over the processes. 1: optimizer state; 2: gradients too; 3: weights too."""
    offload: bool = False
    """deepspeed: keep fp32 masters, AdamW's moments and gradients in host memory, and update there."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """deepspeed: type in which gradients are summed over processes; bf16 halves the traffic and rounds every sum."""
    sequence_parallel: int = Field(1, ge=1, le=1024)
    """deepspeed: processes that share each packed row, a part of its tokens each, for sequences that one GPU cannot hold."""

    @model_validator(mode="after")
    def _check(self) -> EngineConfig:
        if self.sequence_parallel > 1 and self.kind != "deepspeed":
            raise ValueError(
                f"sequence_parallel shares rows among the processes of kind deepspeed, got {self.sequence_parallel} and "
                f"kind {self.kind}"
            )
        return self
