"""How answers are drawn."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from amft_fast.config.kinds import FilePath, Rows, Seconds, Section, Temperature, Tokens


class VllmConfig(Section):
    """vLLM as the rollout engine; docs/rollouts.md says which mode when."""

    mode: Literal["colocate", "server"] = "colocate"
    """colocate: one engine per trainer process, on its device; server: servers apart, spoken to over HTTP."""
    num_servers: int = Field(1, ge=1, le=1024)
    """Servers that the trainer starts itself (mode server without `urls`)."""
    urls: list[str] = []
    """Servers that run already (http://HOST:PORT), instead of starting any; docs/rollouts.md says how they must be started."""
    devices: list[str] = []
    """CUDA_VISIBLE_DEVICES of each server that is started; default: one GPU each, after those of the trainer."""
    host: str = "127.0.0.1"
    """Where started servers listen, and where the weights' process group meets. Other than localhost it needs `api_key_env`."""
    api_key_env: str = ""
    """Environment variable with the servers' API key; default: a random key per started server."""
    python: FilePath = ""
    """Python that runs started servers, where vLLM lives in an environment of its own; default: the trainer's."""
    backend: Literal["auto", "nccl", "ipc", "gloo"] = "auto"
    """How weights travel; auto: gloo on a CPU, ipc to a colocated engine on a GPU, nccl to servers on other GPUs."""
    adapter_only: bool = False
    """With model.lora.rank: engines read the base from model.path and are given the factors alone, in a folder under run.dir
    that they must see. Else they are given merged weights."""
    router_replay: bool = False
    """With a mixture of experts: the engine tells which experts each token went to, and the trainer's passes send it there too.
    vLLM needs Triton for it, so a GPU."""
    bucket_bytes: int = Field(1 << 28, ge=1 << 10, le=1 << 40)
    """Size of the packed buckets that weights travel in."""
    tensor_parallel_size: int = Field(1, ge=1, le=1024)
    """GPUs per engine."""
    gpu_memory_utilization: float = Field(0.5, gt=0, lt=1)
    """Share of a GPU's memory for the engine (a colocated one gives it back while the trainer works)."""
    kv_cache_bytes: int | None = Field(None, ge=1 << 20)
    """Memory for keys and values, instead of a share of the GPU; default on a CPU: that of two of the longest sequences, from
    256 MiB to 2 GiB."""
    max_model_len: int | None = Field(None, ge=2, le=2**24)
    """Longest prompt with its answer; default: the model's own bound."""
    max_num_seqs: Rows = 256
    """Sequences that an engine decodes at once."""
    enforce_eager: bool | None = None
    """No CUDA graphs and no compilation; default: on a CPU only."""
    sleep: bool = True
    """Whether a colocated engine on a GPU gives its memory back while the trainer works."""
    start_timeout_s: Seconds = 600.0
    """How long a server may take to come up."""
    call_timeout_s: Seconds = 60.0
    """Bound of every control call, and of a whole transfer of weights."""
    generate_timeout_s: Seconds = 1800.0
    """Bound of one request for a prompt's answers."""
    health_every_s: Seconds = 5.0
    """Seconds between health checks while rollouts are drawn."""
    health_timeout_s: Seconds = 10.0
    """A server that does not answer its health check in this time counts as hung."""
    max_retries: int = Field(3, ge=0)
    """How often one batch of rollouts, or one transfer of weights, is tried again."""
    max_restarts: int = Field(5, ge=0)
    """How often in a run one server is started again."""

    @model_validator(mode="after")
    def _check(self) -> VllmConfig:
        if self.host not in ("127.0.0.1", "localhost", "::1") and not self.api_key_env:
            raise ValueError(
                f"host {self.host!r} opens the servers' development routes to a network: name the environment variable that "
                "holds an API key in api_key_env, or keep 127.0.0.1"
            )
        if self.devices and len(self.devices) != self.num_servers:
            raise ValueError(f"devices must name one set per server, got {len(self.devices)} for {self.num_servers}")
        return self


class RolloutConfig(Section):
    """How the policy's own answers are drawn for training."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """transformers: in-process, shares the trainer's weights; vllm: vLLM, with the weights sent to it in place."""
    vllm: VllmConfig = VllmConfig()
    async_steps: int = Field(0, ge=0, le=8)
    """0: exactly on-policy; above: rollouts of so many steps to come are drawn while a step trains, and none is trained on
    that is older than so many steps (vllm, mode server)."""
    in_flight: bool = False
    """Give servers new weights in the midst of answers, which go on with them: nothing waits for what is drawn ahead, and
    tokens of one answer are of several versions (async_steps above 0)."""
    recompute_kv: bool = False
    """In flight: whether keys and values of what was drawn before an update are computed anew with the new weights."""
    mismatch_warn: float = Field(0.05, gt=0)
    """Mean |log-prob difference| between rollout engine and trainer from which on a step warns."""
    num_generations: Rows = 8
    """Answers per prompt: the group of group-relative advantages."""
    temperature: Temperature = 1.0
    """Sampling temperature; the loss uses the same."""
    top_p: float = 1.0
    """Must stay 1: the trainer cannot reproduce a truncated distribution (evaluation may truncate, see eval.top_p)."""
    top_k: int = Field(0)
    """Must stay 0, as top_p must stay 1."""
    min_p: float = 0.0
    """Must stay 0, as top_p must stay 1."""
    max_new_tokens: Tokens = 1024
    """Bound on the tokens of one turn."""
    max_batch: Rows = 512
    """Sequences decoded at once by the transformers engine; changes memory and speed only."""
    max_batch_tokens: int | None = Field(None, ge=1)
    """Bound on the tokens (prompts padded to the longest, plus max_new_tokens each) of the sequences that the transformers
    engine decodes at once: prompts come in buckets by length. Changes memory and speed only; default: max_batch alone."""
    dynamic_sampling: bool = False
    """Replace groups whose rewards are all equal, which teach nothing, by groups of the next prompts."""
    ask_again: float | None = Field(None, gt=0, le=1)
    """Probability with which a prompt whose answers all earned the same, which teaches nothing, is in the next pass over the
    prompts; squared after two such times in a row, to the third power after three. 1: all prompts are in every pass. Default:
    0.5 where method amft compares answers to one prompt, else 1."""
    max_redraws: int = Field(3, ge=1, le=1000)
    """How often in a step dynamic sampling replaces; groups that are flat then stay."""

    @model_validator(mode="after")
    def _check(self) -> RolloutConfig:
        if self.top_p != 1 or self.top_k != 0 or self.min_p != 0:
            raise ValueError(
                "top_p, top_k and min_p must stay 1, 0 and 0 for training rollouts, because the trainer cannot reproduce "
                f"a truncated distribution, got {self.top_p}, {self.top_k} and {self.min_p}; use temperature"
            )
        if self.dynamic_sampling and self.async_steps:
            raise ValueError(
                "dynamic_sampling needs the rewards before it goes on, so async_steps must be 0, "
                f"got {self.async_steps}"
            )
        if self.in_flight and not self.async_steps:
            raise ValueError("in_flight changes weights under what is drawn ahead: it needs async_steps above 0, got 0")
        if self.recompute_kv and not self.in_flight:
            raise ValueError(
                "recompute_kv says what in_flight does with answers that are under way: it needs in_flight"
            )
        if self.async_steps and (self.engine, self.vllm.mode) != ("vllm", "server"):
            raise ValueError(
                f"async_steps {self.async_steps} needs engine 'vllm' and vllm.mode 'server': any other engine works on the "
                f"trainer's own device, got {self.engine!r} and {self.vllm.mode!r}"
            )
        return self
