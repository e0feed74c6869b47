"""The row mathematics in Triton: one program per row of logits, everything in fp32.

The formulas are those of `row_math.py`, `policy_terms.py` and `loss_forms.py`. Four kernels are made of the same parts:

    policy_rows_kernel     statistics, coefficients from the per-token inputs, ∂L/∂x      (linear_policy_loss)
    policy_parts_kernel    the same by several programs a row, which read it once         (linear_policy_loss, on a GPU)
    logprob_rows_kernel    statistics                                                     (linear_logprob, forward)
    slab_grad_kernel       ∂L/∂x of a slab from saved statistics                          (linear_logprob, backward)

The policy kernel reads a row twice, statistics then gradient: the second time from its end, which was read last and is
most likely still in L2. ∂L/∂x overwrites the row's own memory. In bf16 it needs half of it, and since blocks are walked
from the end it takes the right half: the gradient of columns [kB, (k+1)B) lies where the logits (P + kB)/2 and on were,
P the row's length, and those are of block k or later. So nothing unread is overwritten, provided that all threads have
loaded block k before any of them stores its gradient: hence the barrier. (The interpreter runs a program's threads in
step and cannot show this race.)

The parts kernel reads a row once: each of its programs keeps its part of the row in registers, tells the others its
statistics through memory, waits until all have told theirs, and then writes its part of the gradient. All have loaded by
then, so the gradient may lie anywhere over the logits. It is 6 bytes a logit instead of 10. Programs of a row wait for one
another, so they must run at the same time: a GPU starts programs in their order, and a row's are neighbours. (The
interpreter runs one program after the other and would wait for ever.)

A row is P = a multiple of 64 columns long, whatever the vocabulary, so that loads and stores are 128 bits wide; columns
from V to P hold anything and count for nothing.

Launched from `rows_launch.py`. Legend: V columns of a row (the vocabulary, or a slab of it), P its length in memory.
"""

import triton
import triton.language as tl
from amft_kernels.policy_terms import LOG_RATIO_LIMIT

# Padding stays below a real column at −inf, which a bias may hold. Both are finite, with finite squares, so that 0 · z and
# 0 · z² are 0 and not NaN.
PADDING = tl.constexpr(-1.0e18)
LOWEST = tl.constexpr(-1.0e15)
_LIMIT = tl.constexpr(LOG_RATIO_LIMIT)

# Pointers into the middle of per-token vectors: specialised on their alignment, chunks would compile anew.
_PER_TOKEN = (
    "targets_ptr",
    "temperature_ptr",
    "nll_weight_ptr",
    "shaped_weight_ptr",
    "pg_weight_ptr",
    "entropy_weight_ptr",
    "advantages_ptr",
    "old_ptr",
    "behavior_ptr",
    "ref_ptr",
    "logprobs_ptr",
    "entropy_ptr",
    "max_ptr",
    "log_sum_ptr",
    "logprobs_grad_ptr",
    "entropy_grad_ptr",
)


@triton.jit
def _load_z(row_ptr, bias_ptr, cols, V, inverse_temperature, softcap):
    """z of these columns, with padding far below any real one."""
    x = tl.load(row_ptr + cols, mask=cols < tl.cdiv(V, 16) * 16, other=0.0)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
    z = scale(x, inverse_temperature, softcap)
    if bias_ptr is not None:
        z = tl.maximum(z, LOWEST)
    return tl.where(cols < V, z, PADDING)


@triton.jit
def scale(x, inverse_temperature, softcap):
    """c · tanh(x / c) / T, or x / T. tanh from one exp of a negative number: no overflow."""
    if softcap is not None:
        decay = tl.exp(-2.0 * tl.abs(x) / softcap)
        magnitude = softcap * (1.0 - decay) / (1.0 + decay)
        x = tl.where(x < 0, -magnitude, magnitude)
    return x * inverse_temperature


@triton.jit
def _inverse_temperature(temperature_ptr, temperature, row):
    if temperature_ptr is not None:
        return 1.0 / tl.load(temperature_ptr + row)
    else:
        return 1.0 / temperature


@triton.jit
def _row_stats(row_ptr, bias_ptr, V, inverse_temperature, softcap, BLOCK: tl.constexpr):
    """max z, log Σ exp(z − max) and the entropy, in one pass.

    Lanes keep their own sums of e = exp(z − max) and e · (z − max), rescaled when the maximum moves; only the maximum is
    reduced over the program in each step.
    """
    top = tl.full((), PADDING, tl.float32)
    e_sum = tl.zeros((BLOCK,), tl.float32)
    ez_sum = tl.zeros((BLOCK,), tl.float32)
    # Two stages: the next step's loads are under way (asynchronous copies to shared memory) during this one's reduction.
    for first in tl.range(0, V, BLOCK, num_stages=2):
        cols = first + tl.arange(0, BLOCK)
        z = _load_z(row_ptr, bias_ptr, cols, V, inverse_temperature, softcap)
        new_top = tl.maximum(top, tl.max(z, 0))
        shift = top - new_top
        decay = tl.exp(shift)
        z -= new_top
        e = tl.exp(z)
        ez_sum = decay * (ez_sum + shift * e_sum) + e * z
        e_sum = decay * e_sum + e
        top = new_top
    total = tl.sum(e_sum, 0)
    log_sum = tl.log(total)
    return top, log_sum, log_sum - tl.sum(ez_sum, 0) / total


@triton.jit
def _logit_grad(z, cols, target, spike, of_p, of_plogp, top, log_sum, inverse_temperature, softcap, live):
    """(spike · δ + of_p · p + of_plogp · p log p) ∂z/∂x in fp32: in bf16 the target's 1 would swallow p below 0.004."""
    log_p = z - top - log_sum
    grad = tl.exp(log_p) * (of_p + of_plogp * log_p) + tl.where(cols == target, spike, 0.0)
    grad *= inverse_temperature
    if softcap is not None:
        slope = z / (inverse_temperature * softcap)
        grad *= 1.0 - slope * slope
    return tl.where(live, grad, 0.0)  # a row without weight may hold anything: 0 · inf would be NaN


@triton.jit
def _store_grad(
    row_ptr,
    grad_ptr,
    bias_ptr,
    V,
    target,
    spike,
    of_p,
    of_plogp,
    top,
    log_sum,
    inverse_temperature,
    softcap,
    live,
    BLOCK: tl.constexpr,
):
    """∂L/∂x = (spike · δ + of_p · p + of_plogp · p log p) ∂z/∂x, over the logits' memory, from the end of the row."""
    blocks = tl.cdiv(V, BLOCK)
    for step in range(blocks):
        cols = (blocks - 1 - step) * BLOCK + tl.arange(0, BLOCK)
        z = _load_z(row_ptr, bias_ptr, cols, V, inverse_temperature, softcap)
        grad = _logit_grad(z, cols, target, spike, of_p, of_plogp, top, log_sum, inverse_temperature, softcap, live).to(
            grad_ptr.dtype.element_ty
        )
        tl.debug_barrier()
        tl.store(grad_ptr + cols, grad, mask=cols < tl.cdiv(V, 16) * 16)


@triton.jit
def _bounded(log_ratio):
    return tl.minimum(tl.maximum(log_ratio, -_LIMIT), _LIMIT)


@triton.jit
def _form_slope(
    logp,
    old,
    log_ratio,
    ratio,
    passes,
    advantage,
    clip_low,
    clip_high,
    dual_clip,
    ratio_cap,
    tau_positive,
    tau_negative,
    tv_bound,
    FORM: tl.constexpr,
):
    """∂f/∂logp over −A, as `loss_forms`; FORM is a place in `loss_forms.FORMS`."""
    if FORM == 1:  # cispo
        slope = tl.minimum(ratio, ratio_cap)
    elif FORM == 2:  # sapo
        tau = tl.where(advantage > 0, tau_positive, tau_negative)
        # σ(x) from one exp of a negative number: ρ up to 5e8 must not overflow.
        x = tau * (ratio - 1.0)
        decay = tl.exp(-tl.abs(x))
        slope = tl.where(passes, 4.0 * decay / ((1.0 + decay) * (1.0 + decay)) * ratio, 0.0)
    elif FORM == 3:  # dppo
        moved = tl.exp(logp) - tl.exp(old)
        keep = tl.where(advantage > 0, moved, -moved) <= tv_bound
        slope = tl.where(keep, tl.minimum(ratio, ratio_cap), 0.0)
    elif FORM == 4:  # dro
        slope = 1.0 + 0.0 * ratio
    else:
        used_down = tl.maximum(ratio, 1.0 - clip_low)
        if dual_clip is not None:
            used_down = tl.minimum(used_down, dual_clip)
        used = tl.where(advantage >= 0, tl.minimum(ratio, 1.0 + clip_high), used_down)
        slope = tl.where((used == ratio) & passes, ratio, 0.0)
    return slope


@triton.jit
def _logprob_grad(
    logp,
    row,
    nll_weight_ptr,
    shaped_weight_ptr,
    pg_weight_ptr,
    advantages_ptr,
    old_ptr,
    behavior_ptr,
    ref_ptr,
    kl_coef,
    clip_low,
    clip_high,
    dual_clip,
    tis_cap,
    ratio_cap,
    tau_positive,
    tau_negative,
    tv_bound,
    ratio_penalty,
    is_low,
    is_high,
    shape_gamma,
    FORM: tl.constexpr,
    KL: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """a = ∂L/∂logp, as `policy_terms.logprob_grad`; KL and SHAPE are places in `loss_forms.KL_KINDS` and `SHAPES`."""
    a = tl.zeros((), tl.float32)
    if nll_weight_ptr is not None:
        a -= tl.load(nll_weight_ptr + row)
    if shaped_weight_ptr is not None:
        u = tl.load(shaped_weight_ptr + row)
        p = tl.exp(logp)
        if SHAPE == 0:
            shape = shape_gamma * p / ((p + shape_gamma) * (p + shape_gamma))
        else:
            shape = p * (1.0 - p)
        a -= tl.where(u != 0.0, u * shape, 0.0)
    if pg_weight_ptr is not None:
        r = tl.load(pg_weight_ptr + row)
        advantage = tl.load(advantages_ptr + row)
        slope = -advantage
        if behavior_ptr is not None:
            trainer = logp
            if old_ptr is not None:
                trainer = tl.load(old_ptr + row)
            whole = tl.exp(_bounded(trainer - tl.load(behavior_ptr + row)))
            importance = whole
            if tis_cap is not None:
                importance = tl.minimum(importance, tis_cap)
            if is_low is not None:
                importance = tl.where(whole < is_low, 0.0, importance)
            if is_high is not None:
                importance = tl.where(whole > is_high, 0.0, importance)
            slope *= importance
        if old_ptr is not None:
            old = tl.load(old_ptr + row)
            raw = logp - old
            log_ratio = _bounded(raw)
            ratio = tl.exp(log_ratio)
            slope *= _form_slope(
                logp,
                old,
                log_ratio,
                ratio,
                raw == log_ratio,
                advantage,
                clip_low,
                clip_high,
                dual_clip,
                ratio_cap,
                tau_positive,
                tau_negative,
                tv_bound,
                FORM,
            )
            slope += tl.where(raw == log_ratio, ratio_penalty * log_ratio, 0.0)
        if ref_ptr is not None:
            raw_ref = tl.load(ref_ptr + row) - logp
            d = _bounded(raw_ref)
            if KL == 0:
                kl_slope = 1.0 + 0.0 * d
            elif KL == 1:
                kl_slope = -d
            else:
                kl_slope = 1.0 - tl.exp(d)
            slope += kl_coef * tl.where(raw_ref == d, kl_slope, 0.0)
        # NaN in the inputs of a row without weight must not spread: 0 · NaN is NaN, so choose instead.
        a += tl.where(r != 0.0, r * slope, 0.0)
    return a


@triton.jit(do_not_specialize=["first_row"], do_not_specialize_on_alignment=_PER_TOKEN)
def policy_rows_kernel(
    logits_ptr,
    grad_ptr,
    bias_ptr,
    targets_ptr,
    temperature_ptr,
    nll_weight_ptr,
    shaped_weight_ptr,
    pg_weight_ptr,
    entropy_weight_ptr,
    advantages_ptr,
    old_ptr,
    behavior_ptr,
    ref_ptr,
    logprobs_ptr,
    entropy_ptr,
    first_row,
    V,
    row_stride,
    grad_stride,
    temperature,
    softcap,
    kl_coef,
    clip_low,
    clip_high,
    dual_clip,
    tis_cap,
    ratio_cap,
    tau_positive,
    tau_negative,
    tv_bound,
    ratio_penalty,
    is_low,
    is_high,
    shape_gamma,
    FORM: tl.constexpr,
    KL: tl.constexpr,
    SHAPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk_row = tl.program_id(0).to(tl.int64)
    row = chunk_row + first_row
    row_ptr = logits_ptr + chunk_row * row_stride
    target = tl.load(targets_ptr + row)
    inverse_temperature = _inverse_temperature(temperature_ptr, temperature, row)
    top, log_sum, entropy = _row_stats(row_ptr, bias_ptr, V, inverse_temperature, softcap, BLOCK)
    logp = _load_z(row_ptr, bias_ptr, target, V, inverse_temperature, softcap) - top - log_sum
    tl.store(logprobs_ptr + row, logp)
    tl.store(entropy_ptr + row, entropy)
    if grad_ptr is not None:
        a = _logprob_grad(
            logp,
            row,
            nll_weight_ptr,
            shaped_weight_ptr,
            pg_weight_ptr,
            advantages_ptr,
            old_ptr,
            behavior_ptr,
            ref_ptr,
            kl_coef,
            clip_low,
            clip_high,
            dual_clip,
            tis_cap,
            ratio_cap,
            tau_positive,
            tau_negative,
            tv_bound,
            ratio_penalty,
            is_low,
            is_high,
            shape_gamma,
            FORM,
            KL,
            SHAPE,
        )
        e = tl.zeros((), tl.float32)
        if entropy_weight_ptr is not None:
            e = tl.load(entropy_weight_ptr + row)
        _store_grad(
            row_ptr,
            grad_ptr + chunk_row * grad_stride,
            bias_ptr,
            V,
            target,
            a,
            e * entropy - a,
            e,
            top,
            log_sum,
            inverse_temperature,
            softcap,
            (a != 0.0) | (e != 0.0),
            BLOCK,
        )


@triton.jit(do_not_specialize=["first_row"], do_not_specialize_on_alignment=_PER_TOKEN)
def policy_parts_kernel(
    logits_ptr,
    grad_ptr,
    bias_ptr,
    targets_ptr,
    temperature_ptr,
    nll_weight_ptr,
    shaped_weight_ptr,
    pg_weight_ptr,
    entropy_weight_ptr,
    advantages_ptr,
    old_ptr,
    behavior_ptr,
    ref_ptr,
    logprobs_ptr,
    entropy_ptr,
    stats_ptr,
    arrived_ptr,
    first_row,
    V,
    row_stride,
    grad_stride,
    temperature,
    softcap,
    kl_coef,
    clip_low,
    clip_high,
    dual_clip,
    tis_cap,
    ratio_cap,
    tau_positive,
    tau_negative,
    tv_bound,
    ratio_penalty,
    is_low,
    is_high,
    shape_gamma,
    FORM: tl.constexpr,
    KL: tl.constexpr,
    SHAPE: tl.constexpr,
    PARTS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program PARTS · row + part. `stats` [rows, 3, SLOTS], `arrived` [rows] of zeros; SLOTS: PARTS or the next power of 2."""
    chunk_row = (tl.program_id(0) // PARTS).to(tl.int64)
    part = tl.program_id(0) % PARTS
    row = chunk_row + first_row
    row_ptr = logits_ptr + chunk_row * row_stride
    target = tl.load(targets_ptr + row)
    inverse_temperature = _inverse_temperature(temperature_ptr, temperature, row)
    cols = part * BLOCK + tl.arange(0, BLOCK)
    z = _load_z(row_ptr, bias_ptr, cols, V, inverse_temperature, softcap)
    z_target = _load_z(row_ptr, bias_ptr, target, V, inverse_temperature, softcap)
    own_top = tl.max(z, 0)
    own_e = tl.exp(z - own_top)
    mine = stats_ptr + chunk_row * 3 * SLOTS + part
    tl.store(mine, own_top)
    tl.store(mine + SLOTS, tl.sum(own_e, 0))
    tl.store(mine + 2 * SLOTS, tl.sum(own_e * (z - own_top), 0))
    tl.debug_barrier()
    tl.atomic_add(arrived_ptr + chunk_row, 1, sem="release")
    while tl.atomic_add(arrived_ptr + chunk_row, 0, sem="acquire") < PARTS:
        pass
    slots = tl.arange(0, SLOTS)
    theirs = stats_ptr + chunk_row * 3 * SLOTS + slots
    # Past the first-level cache, which other programs' stores do not reach.
    tops = tl.load(theirs, mask=slots < PARTS, other=PADDING, cache_modifier=".cg")
    e_sums = tl.load(theirs + SLOTS, mask=slots < PARTS, other=0.0, cache_modifier=".cg")
    ez_sums = tl.load(theirs + 2 * SLOTS, mask=slots < PARTS, other=0.0, cache_modifier=".cg")
    top = tl.max(tops, 0)
    decay = tl.exp(tops - top)
    total = tl.sum(decay * e_sums, 0)
    log_sum = tl.log(total)
    entropy = log_sum - tl.sum(decay * (ez_sums + (tops - top) * e_sums), 0) / total
    logp = z_target - top - log_sum
    if part == 0:
        tl.store(logprobs_ptr + row, logp)
        tl.store(entropy_ptr + row, entropy)
    a = _logprob_grad(
        logp,
        row,
        nll_weight_ptr,
        shaped_weight_ptr,
        pg_weight_ptr,
        advantages_ptr,
        old_ptr,
        behavior_ptr,
        ref_ptr,
        kl_coef,
        clip_low,
        clip_high,
        dual_clip,
        tis_cap,
        ratio_cap,
        tau_positive,
        tau_negative,
        tv_bound,
        ratio_penalty,
        is_low,
        is_high,
        shape_gamma,
        FORM,
        KL,
        SHAPE,
    )
    e = tl.zeros((), tl.float32)
    if entropy_weight_ptr is not None:
        e = tl.load(entropy_weight_ptr + row)
    grad = _logit_grad(
        z, cols, target, a, e * entropy - a, e, top, log_sum, inverse_temperature, softcap, (a != 0.0) | (e != 0.0)
    )
    tl.store(
        grad_ptr + chunk_row * grad_stride + cols,
        grad.to(grad_ptr.dtype.element_ty),
        mask=cols < tl.cdiv(V, 16) * 16,
    )


@triton.jit(do_not_specialize=["first_row"], do_not_specialize_on_alignment=_PER_TOKEN)
def logprob_rows_kernel(
    logits_ptr,
    bias_ptr,
    targets_ptr,
    temperature_ptr,
    logprobs_ptr,
    entropy_ptr,
    max_ptr,
    log_sum_ptr,
    first_row,
    V,
    row_stride,
    temperature,
    softcap,
    BLOCK: tl.constexpr,
):
    chunk_row = tl.program_id(0).to(tl.int64)
    row = chunk_row + first_row
    row_ptr = logits_ptr + chunk_row * row_stride
    target = tl.load(targets_ptr + row)
    inverse_temperature = _inverse_temperature(temperature_ptr, temperature, row)
    top, log_sum, entropy = _row_stats(row_ptr, bias_ptr, V, inverse_temperature, softcap, BLOCK)
    logp = _load_z(row_ptr, bias_ptr, target, V, inverse_temperature, softcap) - top - log_sum
    tl.store(logprobs_ptr + row, logp)
    tl.store(entropy_ptr + row, entropy)
    tl.store(max_ptr + row, top)
    tl.store(log_sum_ptr + row, log_sum)


@triton.jit(do_not_specialize=["first_row", "first_col"], do_not_specialize_on_alignment=_PER_TOKEN)
def slab_grad_kernel(
    logits_ptr,
    grad_ptr,
    bias_ptr,
    targets_ptr,
    temperature_ptr,
    entropy_ptr,
    max_ptr,
    log_sum_ptr,
    logprobs_grad_ptr,
    entropy_grad_ptr,
    first_row,
    first_col,
    V,
    row_stride,
    grad_stride,
    temperature,
    softcap,
    BLOCK: tl.constexpr,
):
    chunk_row = tl.program_id(0).to(tl.int64)
    row = chunk_row + first_row
    a = tl.load(logprobs_grad_ptr + row)
    b = tl.zeros((), tl.float32)
    if entropy_grad_ptr is not None:
        b = tl.load(entropy_grad_ptr + row)
    _store_grad(
        logits_ptr + chunk_row * row_stride,
        grad_ptr + chunk_row * grad_stride,
        bias_ptr,
        V,
        tl.load(targets_ptr + row) - first_col,
        a,
        -(a + b * tl.load(entropy_ptr + row)),
        -b,
        tl.load(max_ptr + row),
        tl.load(log_sum_ptr + row),
        _inverse_temperature(temperature_ptr, temperature, row),
        softcap,
        (a != 0.0) | (b != 0.0),
        BLOCK,
    )
