"""Memory per GPU and FLOPs per step of a config, from the model's shape alone; the formulas are in docs/scale.md.

Everything is in bytes, FLOPs and tokens. What is exact: parameters, masters, gradients, moments, the probe's buffers, the KV
cache. What is a formula held against measurements in tests: activations, the loss head, sampling. What is assumed and stated:
DeepSpeed's buckets and the margin.

Legend: P parameters, b bytes of a parameter in the forward pass (2 in bf16, 4 in fp32), N ranks, T tokens of a micro-batch,
S tokens of the longest sequence, B sequences decoded at once; the sizes of a layer are plan_shapes'.
"""

from __future__ import annotations

from dataclasses import dataclass

from amft_fast.config import Config
from amft_fast.doctor.shapes import Shape, Tower
from amft_fast.methods import METHODS

# DeepSpeed's defaults, in elements: stage3_max_live_parameters, and reduce_bucket_size (held twice while reductions overlap).
LIVE, BUCKET = 10**9, 5 * 10**8
# Beside tensors: CUDA context, cuBLAS and NCCL buffers (or Python with torch on a CPU), and the allocator's holes.
CONTEXT = {"cuda": 2e9, "cpu": 0.4e9}
HOLES = 0.05
MOMENTS = {"adamw": 8, "sgd": 0}  # of fp32, of a parameter
# Of a GPU by its name, in dense bf16 as its vendor states it.
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}


@dataclass(frozen=True)
class Machine:
    """Where the config is to run, and how long its texts are."""

    gpus: int
    memory: float  # bytes of each GPU
    device: str = "cuda"
    prompt_tokens: int = 512
    response_tokens: int | None = None  # mean; None: rollout.max_new_tokens
    image_tokens: int = 0
    peak_flops: float = PEAK_FLOPS["H100"]
    mfu: float = 0.4


@dataclass(frozen=True)
class Part:
    """A share of the memory, and what it follows from."""

    name: str
    bytes: float
    why: str = ""


@dataclass(frozen=True)
class Memory:
    """`static` is there all the time; of `phases` one at a time."""

    static: list[Part]
    phases: dict[str, list[Part]]
    host: float  # bytes per node with CPU offload
    context: float

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: total(self.phases[name]))

    @property
    def at_peak(self) -> list[Part]:
        return self.static + self.phases[self.peak_phase]

    @property
    def margin(self) -> float:
        return self.context + HOLES * total(self.at_peak)

    @property
    def needed(self) -> float:
        return total(self.at_peak) + self.margin

    @property
    def largest(self) -> Part:
        return max(self.at_peak, key=lambda part: part.bytes)


def total(parts: list[Part]) -> float:
    return sum(p.bytes for p in parts)


@dataclass(frozen=True)
class Layout:
    """What is divided by what: the config and the machine, read for the formulas."""

    ranks: int
    stage: int  # 0: nothing is sharded
    offload: bool
    width: int  # b
    tokens: int  # T
    longest: int  # S
    rows: int  # of T with a loss
    shared: int = 1  # ranks that share a row

    @classmethod
    def of(cls, cfg: Config, machine: Machine) -> Layout:
        sharded = cfg.engine.kind == "deepspeed"
        ranks = machine.gpus if sharded else 1
        own = str(cfg.task.options.get("max_turns", 1))  # of a task that is not shipped, where it calls them so
        turns = getattr(cfg.task.section, "max_turns", int(own) if own.isdigit() else 1)
        longest = machine.prompt_tokens + machine.image_tokens + turns * cfg.rollout.max_new_tokens
        rollouts = cfg.train.prompts_per_step * cfg.rollout.num_generations
        shared = cfg.engine.sequence_parallel if sharded else 1
        step = -(-max(rollouts, cfg.train.demos_per_step) // cfg.train.minibatches_per_rollout // (ranks // shared))
        row = min(max(shared * cfg.train.micro_batch_tokens, longest), step * longest)
        tokens = -(-row // shared)
        prompts = row // longest * (machine.prompt_tokens + machine.image_tokens)
        dtype = {"auto": "bf16" if machine.device == "cuda" else "fp32"}.get(cfg.model.dtype, cfg.model.dtype)
        return cls(
            ranks=ranks,
            stage=cfg.engine.zero_stage if sharded else 0,
            offload=sharded and cfg.engine.offload,
            width={"bf16": 2, "fp32": 4}[dtype],
            tokens=tokens,
            longest=longest,
            rows=min(tokens, row - prompts),  # those of some rank may all have one
            shared=shared,
        )

    def share(self, count: float, stage: int) -> float:
        """`count` when it is sharded from ZeRO `stage` on."""
        return count / self.ranks if self.stage >= stage else count

    def of_ranks(self, stage: int) -> str:
        return f" / {self.ranks}" if self.stage >= stage and self.ranks > 1 else ""


# -------------------------------------------------------------------------------------------------------------- formulas


def layer_bytes(t: Tower, width: int, attention: str, length: int, shared: int = 1, mlp_kept: bool = True) -> float:
    """What the backward pass of one layer keeps, in bytes per token, beside the layer's input.

    A norm keeps its input in fp32, one number per row and the normalised input; its output feeds a product. Attention keeps
    q, k, v, its output and one log-sum per head (eager attention its probabilities over `length` keys as well); the MLP
    gate, activated gate, up and their product. A mixture (`grouped_mm`) keeps these of each chosen expert, with its input and
    output, the router's probabilities, and numbers of tokens and experts. Where ranks share rows attention's output is there
    twice, of some heads and of some tokens, and keys and values as often as their heads are copied.
    """
    norms = t.norms * ((4 + width) * t.hidden + 4) + 2 * width * t.hidden
    if t.qk_norm:
        norms += (4 + width) * (t.q + t.k) + 4 * (t.heads + t.kv_heads)
    mlp = 4 * width * t.intermediate
    if t.experts:
        mlp = t.chosen * (mlp + 2 * width * t.hidden + 36 + width) + 4 * t.experts + 4
    kept = norms + width * (2 * t.q + 2 * t.k) + 4 * t.heads + (mlp if mlp_kept else 0)
    if shared > 1:
        kept += width * (t.q + 2 * (max(1, shared // t.kv_heads) - 1) * t.k)
    if attention == "eager":  # fp32 softmax and its cast; keys and values repeated for each head
        kept += t.heads * length * (4 + width % 4) + width * 2 * (t.q - t.k) - 4 * t.heads
    return kept


def backward_bytes(t: Tower, width: int, tokens: float) -> float:
    """What the backward pass of one layer has at its highest beside what is kept, in bytes: in the MLP.

    Its product is freed, and the gradients of three tensors of its width are there. In a mixture: the gradients of its
    experts' outputs, in their order and in that of the tokens; or those of gate and up; or at last that of all experts' gate
    and up, whole, when four tensors of each chosen expert's width are freed and two of gradients are there.
    """
    if not t.experts:
        return tokens * width * (2 * t.intermediate + t.hidden)
    unit, whole = tokens * width * t.chosen, 2 * width * t.experts * t.hidden * t.intermediate
    early = unit * max(3 * t.hidden, 2 * t.intermediate - t.hidden)
    return tokens * width * t.hidden + max(early, whole - 2 * unit * t.intermediate)


def layers_bytes(cfg: Config, shape: Shape, at: Layout, image_tokens: int = 0) -> tuple[float, float]:
    """(kept of the layers from the forward to the backward pass, more at the worst moment of the latter)."""
    b, towers = at.width, [(shape.text, at.tokens)]
    if shape.vision is not None:
        sequences = -(-at.tokens // at.longest)
        towers.append((shape.vision, sequences * image_tokens * shape.patches_per_token))
    kept = worst = 0.0
    for tower, tokens in towers:
        tiled = cfg.model.mlp_tile is not None and cfg.model.mlp_tile < tokens
        layer = tokens * layer_bytes(tower, b, cfg.model.attention, at.longest, at.shared, not tiled)
        entrance = tokens * b * tower.hidden
        work = backward_bytes(tower, b, tokens)
        if (
            tiled
        ):  # of a tile what is kept too (or a weight's gradient), of all tokens the gradients of input and output
            tile = cfg.model.mlp_tile
            wide = max(6 * tile, 5 * tile + tower.hidden)
            work = b * (wide * tower.intermediate + 2 * tower.hidden * tokens)
        if cfg.model.gradient_checkpointing:  # the first norm keeps its input, which in fp32 is the layer's own
            kept, worst = kept + tower.layers * entrance, max(worst, layer - (entrance if b == 4 else 0) + work)
        else:
            kept, worst = kept + tower.layers * layer, max(worst, work)
    return kept, worst


def final_norm_bytes(shape: Shape, at: Layout) -> float:
    """What the last norm and the position embedding keep."""
    positions = min(at.longest, at.tokens) if at.shared > 1 else at.longest
    return at.tokens * ((4 + at.width) * shape.text.hidden + 4) + positions * 2 * at.width * shape.text.head_dim


def head_bytes(shape: Shape, at: Layout, device: str, memory: float) -> float:
    """The loss head at its highest: its rows and their gradients, and the workspace of a chunk."""
    import torch

    from amft_fast.ops import chunk_bytes, cpu_scratch_bytes

    hidden, logits, budget = shape.text.hidden, 4 * at.rows * shape.vocab, chunk_bytes(device, int(memory))
    rows = 2 * at.width * at.rows * hidden
    if at.stage:  # no flat gradient to add to: dW in fp32 of its own
        rows += 4 * shape.head
    if device == "cuda":
        return rows + min(logits, budget)
    chunk = min(logits, 3 * budget // 4)
    dtype = torch.bfloat16 if at.width == 2 else torch.float32
    scratch = cpu_scratch_bytes(chunk // (4 * shape.vocab), shape.vocab, hidden, dtype)
    return rows + chunk + 2 * min(logits, budget // 16) + scratch


def cache_bytes(t: Tower, width: int) -> float:
    """The KV cache of one token."""
    return 2 * t.layers * t.k * width


# ---------------------------------------------------------------------------------------------------------------- memory


def memory(cfg: Config, shape: Shape, machine: Machine) -> Memory:
    """Memory per GPU (per process on a CPU), part by part."""
    at = Layout.of(cfg, machine)
    static, host = _states(cfg, shape, at)
    state = at.share((4 + MOMENTS[cfg.train.optimizer]) * (shape.parameters if at.stage else shape.flat), 1)
    copies = state if saves_beside(cfg) else 0
    if cfg.in_blocks:
        kept, copies = state, 2 * copies
        if machine.device == "cpu":
            static.append(
                Part("kept weights and moments", kept, f"fp32, what a block may be taken back to{at.of_ranks(1)}")
            )
        else:
            host += kept * min(at.ranks, 8)
    copies += at.share(8 * shape.flat, 1) if copies and cfg.takes_utility else 0
    if copies and machine.device == "cpu":
        static.append(Part("copies for a checkpoint", copies, f"of what is saved while steps go on{at.of_ranks(1)}"))
    else:
        host += copies * min(at.ranks, 8)
    one_half = 0 if at.offload else at.share(4 * shape.flat, 1)
    kept, worst = layers_bytes(cfg, shape, at, machine.image_tokens)
    head = final_norm_bytes(shape, at) + head_bytes(shape, at, machine.device, machine.memory)
    # Head and layers take turns; at the end of the backward pass one whole gradient of the largest tensor is there.
    work = max(head, worst, at.width * shape.largest - kept)
    words = [f"{at.tokens} tokens in a micro-batch"]
    words += [f"a share of {at.shared} ranks"] if at.shared > 1 else []
    words += ["checkpointed"] if cfg.model.gradient_checkpointing else []
    if cfg.model.offload_activations and machine.device == "cuda":  # but for what is on its way
        host += kept * min(at.ranks, 8)
        kept *= min(1, 2 / shape.text.layers)
        words.append("two layers' worth, the rest on the host")
    sweep = [
        Part("activations", kept, ", ".join(words)),
        Part("loss head or a layer", work, f"at its highest: the {'head' if head >= worst else 'layer'}"),
        *_communication(cfg, shape, at),
    ]
    phases = {"update": sweep}
    if cfg.rollout.engine == "vllm":
        stays, engine = _vllm(cfg, shape, at, machine)
        phases["rollouts"] = [] if stays else [engine]
        static += [engine] if stays else []
    else:
        phases["rollouts"] = _rollouts(cfg, shape, at, machine)
    if cfg.takes_utility:
        # Two old halves of u are in `static`; new ones are taken beside them, and once more when the cache is redrawn.
        copies = 1 if cfg.meta.memory > 0 else 3
        words = f"{copies} new half" if copies == 1 else f"{copies} new halves"
        phases["utility gradient"] = [Part("u, being renewed", copies * one_half, words), *sweep]
    if METHODS[cfg.train.method].learns_from_noise:
        halves = Part("gradients of L_SFT and L_RL", 4 * one_half, "two halves of each, before an update")
        phases["noise of the gradients"] = [halves, *sweep]
    return Memory(static, phases, host, CONTEXT[machine.device])


def saves_beside(cfg: Config) -> bool:
    """Whether checkpoints are written while steps go on: on their schedule, or of what was best at an evaluation."""
    c, steps = cfg.checkpoint, cfg.train.warmup_steps + cfg.train.steps
    best = c.keep_best and 0 < cfg.eval.every < cfg.train.steps
    return c.background and (0 < c.every < steps or best)


def _states(cfg: Config, shape: Shape, at: Layout) -> tuple[list[Part], float]:
    """What is there all the time, and the host memory of a node that offload fills."""
    b, mixed = at.width, at.width == 2
    count = shape.parameters if at.stage else shape.flat  # the local engine's flat buffers are aligned
    cut = at.of_ranks(1)
    moments = MOMENTS[cfg.train.optimizer] * count
    owned = [
        Part("masters", at.share(4 * count, 1) if mixed else 0, f"fp32, 4 P{cut}"),
        Part("gradients", at.share(4 * count, 1), f"fp32, 4 P{cut}"),
        Part("optimizer moments", at.share(moments, 1), f"fp32, {moments // count} P{cut}"),
    ]
    if cfg.takes_utility:
        owned += [
            Part("u, two halves", at.share(8 * count, 1), f"fp32, 8 P{cut}"),
            Part("gradient of the SFT sweep", at.share(4 * count, 1), f"fp32, 4 P{cut}"),
        ]
    static = [Part("weights", at.share(b * (shape.parameters if mixed else count), 3), f"{b} P{at.of_ranks(3)}")]
    static += [] if at.offload else [p for p in owned if p.bytes]
    if at.stage:  # a micro-batch's gradient, reduced; ZeRO-1 keeps it whole until then
        whole = at.stage == 1
        transit = at.share(b * count, 1) + (b * count if whole else 0)
        static.append(Part("gradients in transit", transit, f"DeepSpeed's, {b} P{cut}{f' + {b} P' if whole else ''}"))
    if at.stage == 3 and cfg.rollout.engine == "transformers":
        static.append(Part("weights for rollouts", b * shape.parameters, f"whole on each GPU, {b} P"))
    if cfg.objective.kl_coef > 0 or cfg.log.implicit_reward:
        static.append(Part("reference model", b * shape.parameters, f"whole on each GPU, {b} P"))
    return static, total(owned) * min(at.ranks, 8) if at.offload else 0.0


def _communication(cfg: Config, shape: Shape, at: Layout) -> list[Part]:
    """DeepSpeed's buckets: two in the type of the gradients and one in the type they are summed in."""
    if not at.stage or at.ranks == 1:
        return []
    summed = 4 if getattr(cfg.engine, "reduce_dtype", "fp32") == "fp32" else 0
    buckets = (2 * at.width + summed) * min(shape.parameters, BUCKET)
    gathered = at.width * min(shape.parameters, LIVE) if at.stage == 3 else 0
    why = "reduce buckets" + (" and gathered parameters" if gathered else "")
    return [Part("communication", gathered + buckets, f"{why}, DeepSpeed's default sizes")]


def drawn_at_once(cfg: Config) -> int:
    """The most sequences that the transformers engine decodes at once."""
    return min(cfg.rollout.max_batch, asked_at_once(cfg))


def asked_at_once(cfg: Config) -> int:
    """The most sequences that it is asked for at once: those of a step, a look or an evaluation, whose prompts may be as many
    as there are, or as `rollout.max_batch`, when the config does not bound them."""
    e, most = cfg.eval, cfg.rollout.max_batch
    step = cfg.train.prompts_per_step * cfg.rollout.num_generations
    asked = [step, (e.max_prompts or most) * e.num_samples]
    if e.every:
        asked.append((e.schedule_max_prompts or most) * e.schedule_num_samples)
    if cfg.takes_utility:
        asked.append(cfg.meta.prompts * cfg.meta.num_generations)
    if cfg.in_blocks:
        asked.append(cfg.prompts_of_a_look * cfg.meta.num_generations)
    return max(asked)


def _rollouts(cfg: Config, shape: Shape, at: Layout, machine: Machine) -> list[Part]:
    """The transformers engine: its KV cache at the longest, and the larger of the prefill and the sampling of a token."""
    from amft_fast.rollout.decoder import prefill_tokens

    b, t, batch = at.width, shape.text, drawn_at_once(cfg)
    token, prompt = cache_bytes(t, b), machine.prompt_tokens + machine.image_tokens
    prompts = -(-batch // cfg.rollout.num_generations)  # different ones: each is read once
    logits = 4 * batch * shape.vocab
    # Probabilities; their sums in fp64 are of blocks where the vocabulary is large (rollout/sampling.py).
    sampling = logits + 16 * batch * (shape.vocab if shape.vocab <= 1024 else 400)
    if shape.own_loop:
        cache = batch * (at.longest - 1) * token  # nothing follows the last token, so it is not read
        # A token's activations: memory that all layers share; a mixture's come and go.
        mixture = b * (t.chosen * max(t.hidden + 4 * t.intermediate, 4 * t.hidden) + 2 * t.hidden)
        mixture = mixture + 36 * t.chosen + (4 + b) * t.experts if t.experts else 0
        layer = b * (t.hidden + t.q + 2 * t.k + (0 if t.experts else 2 * t.intermediate))
        read = min(prompts * prompt, max(prefill_tokens(machine.device), prompt))
        attention = b * (t.hidden + 3 * (t.q + t.k))
        layers, last = read * (layer + max(attention, mixture)), 4 * prompts * shape.vocab
        prefill = max(layers, last)
        sampling = max(sampling, batch * mixture)
        logits += batch * layer
    else:
        cache = batch * at.longest * token
        sampling += cache / (2 * t.layers)  # a layer's keys, then its values, are copied to grow
        prefill = prompts * prompt * b * (3 * t.intermediate + 4 * t.hidden) - batch * (at.longest - prompt) * token
    rest, packed = max(sampling, prefill), 0
    if machine.device == "cpu" and shape.own_loop:
        packed, layer, head = _packed(cfg, shape, b)
        if asked_at_once(cfg) <= cfg.rollout.max_batch:  # all prompts are read before the most is packed
            fit = max(1, prefill_tokens(machine.device) // prompt)  # prompts of a pass; the first one packs the head
            again = min(max(prompts - fit, 0), fit) * prompt * layers // read
            packed = max(sampling + packed, layers + layer, max(last, again) + layer + head) - rest
    return [
        Part("KV cache", cache, f"{batch} sequences of {at.longest} tokens"),
        Part("sampling", logits + rest, "or the prefill"),
        *([Part("packed weights", packed, "in the order that a few rows are read by")] if packed else []),
    ]


def _packed(cfg: Config, shape: Shape, b: int) -> tuple[int, int, int]:
    """What the own loop packs on a CPU (rollout/packed.py): plain products, and the head where logits come of products in the
    weights' type. All of it; what of the last layer, which looks at the prompts' last tokens alone behind its attention; and
    the head."""
    import torch

    from amft_fast.ops import bf16_is_faster
    from amft_fast.rollout.packed import pays

    t, dtype = shape.text, torch.float32 if b == 4 else torch.bfloat16
    before, behind = [t.q * t.hidden, t.k * t.hidden, t.k * t.hidden], [t.hidden * t.q]
    behind += [] if t.experts else [2 * t.intermediate * t.hidden, t.hidden * t.intermediate]
    plain, head = not cfg.model.lora.rank, b * shape.vocab * t.hidden
    before, behind = (plain * sum(b * n for n in sizes if pays(dtype, b * n)) for sizes in (before, behind))
    head = head if (b == 4 or bf16_is_faster()) and pays(dtype, head) else 0
    return t.layers * (before + behind) + head, behind, head


def _vllm(cfg: Config, shape: Shape, at: Layout, machine: Machine) -> tuple[bool, Part]:
    """(whether it is there while the trainer works, what a colocated vLLM takes of each GPU): its share, but at least its
    weights and one sequence. Servers have GPUs of their own."""
    v, token = cfg.rollout.vllm, cache_bytes(shape.text, at.width)
    share = v.gpu_memory_utilization * machine.memory
    needs = (at.width * shape.parameters + at.longest * token) / v.tensor_parallel_size
    if v.mode == "server":
        return False, Part("vLLM", 0, "on servers with GPUs of their own")
    why = f"{v.gpu_memory_utilization:.0%} of the GPU" if share >= needs else "its weights and one sequence"
    return not v.sleep, Part("vLLM, colocated", max(share, needs), why)


# ----------------------------------------------------------------------------------------------------------------- FLOPs


def forward_flops(shape: Shape, sequences: float, prompt: float, response: float, image_tokens: int = 0) -> float:
    """One forward pass over sequences of `prompt` + `response` tokens, without the head: 2 per weight and token, and
    4 Q per pair of a token and one before it."""
    t, length = shape.text, prompt + response
    per = 2 * t.layers * t.matrix * length + 4 * t.layers * t.q * length * (length + 1) / 2
    if shape.vision is not None and image_tokens:
        patches = image_tokens * shape.patches_per_token
        v = shape.vision
        per += 2 * v.layers * v.matrix * patches + 4 * v.layers * v.q * patches * patches
    return sequences * per


def rollout_flops(
    shape: Shape, prompts: float, generations: float, prompt: int, response: float, image: int = 0
) -> float:
    """`generations` answers to each prompt, which is prefilled once; the head runs for each new token."""
    whole = forward_flops(shape, prompts * generations, prompt, response)
    shared = forward_flops(shape, prompts * (generations - 1), prompt, 0)
    images = forward_flops(shape, prompts, 0, 0, image)
    return whole - shared + images + 2 * shape.head * prompts * generations * response


def flops(cfg: Config, shape: Shape, machine: Machine) -> dict[str, float]:
    """FLOPs of one step on all GPUs together; evaluations are not counted."""
    g, meta = cfg.rollout.num_generations, cfg.meta
    image, response = machine.image_tokens, machine.response_tokens or cfg.rollout.max_new_tokens
    prompt = machine.prompt_tokens + image
    passes = 4 if cfg.model.gradient_checkpointing else 3
    method = METHODS[cfg.train.method]
    prompts = cfg.train.prompts_per_step if method.has_rl else 0
    # Staged: the dearer half is counted. A mixture's demonstrations are at most its prompts'.
    demos = cfg.train.demos_per_step if method.has_sft and not method.staged else 0
    demos = min(demos, prompts) if method.mixture else demos

    def forward(sequences: float) -> float:
        return forward_flops(shape, sequences, prompt, response, image) + 2 * shape.head * sequences * response

    def both(sequences: float) -> float:
        body = forward_flops(shape, sequences, prompt, response, image)
        return passes * body + 6 * shape.head * sequences * response

    extra = (cfg.train.minibatches_per_rollout > 1 or cfg.advantage.kind == "gae") + (cfg.objective.kl_coef > 0)
    extra += cfg.rollout.temperature != 1
    # What a loss of whole sequences asks for: before each update but the first, or before all.
    updates = cfg.train.minibatches_per_rollout
    extra += 1.0 if cfg.objective.reads_entropy else cfg.objective.reads_logprobs * (1 - 1 / updates)
    out = {
        "rollouts": rollout_flops(shape, prompts, g, prompt, response, image),
        "RL": both(prompts * g),
        "SFT": both(demos),
        "old and reference log-probs": extra * forward(prompts * g),
    }
    if cfg.in_blocks:  # a step does one of the two, for the same
        out.pop("SFT")
    if cfg.takes_utility:
        fresh = meta.refresh_share * meta.prompts
        drawn = rollout_flops(shape, fresh, meta.num_generations, prompt, response, image)
        trained = (fresh if meta.memory > 0 else meta.prompts) * meta.num_generations
        out["utility gradient"] = (drawn + both(trained)) / cfg.controller.window
    if method.learns_from_noise:
        out["noise of the gradients"] = (both(prompts * g) + both(demos)) / cfg.mixture.gac_every
    return {name: value for name, value in out.items() if value}
