"""Cases that broke other loss heads, one check each. A check takes a `Place`; `EDGES` lists them all.

The test files run every check on the torch backend, in Triton's interpreter and on a GPU.
"""

from __future__ import annotations

import functools

import torch
from amft_kernels.linear_logprob import linear_logprob, linear_logprob_reference
from amft_kernels.linear_policy_loss import linear_policy_loss, linear_policy_loss_reference
from loss_head_cases import check_logprob, check_policy, leaf, make_inputs, make_terms, run_logprob, run_policy

NAN, INF = float("nan"), float("inf")
EDGES = []


def edge(check):
    EDGES.append(check)
    return check


def check_both(place, hidden, weight, targets, *, form="mixed", **head):
    chunk_bytes = 8 * weight.shape[0] * 3
    check_logprob(place, hidden, weight, targets, chunk_bytes=chunk_bytes, **head)
    terms = make_terms(place, len(targets), form)
    return check_policy(place, hidden, weight, targets, chunk_bytes=chunk_bytes, **terms, **head)


@edge
def padded_columns_take_no_part(place):
    hidden, weight, targets = make_inputs(place, 7, 6, 37)
    weight[33:] = 50.0  # padding is not zero in real checkpoints
    hidden[:, 0] = 1.0
    got = check_both(place, hidden, weight, targets.clamp(max=32), vocab_size=33)
    assert (got["weight"][33:] == 0).all()


@edge
def rows_of_extreme_logits(place):
    """All −1e4; all equal; one at +1e4: the maximum must not start at 0, the sums must not overflow."""
    hidden = torch.tensor([[-1e4, 0, 0], [0, 0, 0], [0, 1e4, 0], [0, 1e4, 0], [1e4, 0, 0]])
    weight = torch.zeros(41, 3)
    weight[:, 0], weight[5, 1] = 1.0, 1.0
    targets = torch.tensor([3, 0, 5, 6, 40])
    hidden, weight, targets = (
        hidden.to(place.device, place.dtype),
        weight.to(place.device, place.dtype),
        targets.to(place.device),
    )
    check_logprob(place, hidden, weight, targets)
    on = torch.ones(5, device=place.device, dtype=place.wide)
    check_policy(place, hidden, weight, targets, nll_weight=on / 5, entropy_weight=0.1 * on)
    logprobs, entropy = linear_logprob(hidden, weight, targets, backend=place.backend)
    wanted = torch.tensor([1 / 41, 1 / 41, 1.0]).log()
    torch.testing.assert_close(logprobs[:3].cpu().float(), wanted, rtol=1e-6, atol=1e-6)
    assert entropy[2] == 0 and entropy[3] == 0


@edge
def columns_at_minus_infinity(place):
    hidden, weight, targets = make_inputs(place, 9, 6, 37)
    bias = torch.zeros(37, device=place.device, dtype=place.dtype)
    bias[::3] = -INF
    targets = torch.where(targets >= 0, targets // 3 * 3 + 1, targets)
    for softcap in (None, 3.0):
        check_both(place, hidden, weight, targets, bias=bias, logit_softcap=softcap)


@edge
def a_row_at_a_time_and_none(place):
    for n in (0, 1):
        hidden, weight, targets = make_inputs(place, n, 5, 19, ignored=0)
        got = check_both(place, hidden, weight, targets)
    hidden, weight, targets = make_inputs(place, 0, 5, 19)
    got = run_policy(linear_policy_loss, hidden, weight, targets, **make_terms(place, 0), backend=place.backend)
    assert got["loss"] == 0 and (got["weight"] == 0).all() and got["hidden"].shape == (0, 5)


@edge
def every_row_ignored(place):
    hidden, weight, targets = make_inputs(place, 6, 5, 19)
    got = check_both(place, hidden, weight, torch.full_like(targets, -100))
    assert got["loss"] == 0 and (got["weight"] == 0).all() and (got["hidden"] == 0).all()
    assert (got["logprobs"] == 0).all() and (got["entropy"] == 0).all() and got["ratio_max"] == 0


@edge
def targets_at_both_ends(place):
    for v in (1, 2, 64, 65, 1025):
        hidden, weight, targets = make_inputs(place, 4, 5, v, ignored=0)
        targets[:2], targets[2:] = 0, v - 1
        check_both(place, hidden, weight, targets)


@edge
def ignore_index_inside_the_vocabulary(place):
    hidden, weight, targets = make_inputs(place, 8, 5, 19, ignored=0)
    targets[::2] = 0
    got = check_policy(place, hidden, weight, targets, **make_terms(place, 8), ignore_index=0)
    assert (got["logprobs"][::2] == 0).all() and (got["hidden"][::2] == 0).all()


@edge
def entropy_alone_has_its_gradient(place):
    hidden, weight, targets = make_inputs(place, 6, 5, 19, ignored=0)
    on = torch.ones(6, device=place.device, dtype=place.wide)
    got = check_policy(place, hidden, weight, targets, entropy_weight=on)
    assert got["hidden"].abs().max() > 1e-2
    upstream = torch.stack([torch.zeros_like(on), on])
    run = run_logprob(linear_logprob, hidden, weight, targets, upstream=-upstream, backend=place.backend)
    torch.testing.assert_close(run["hidden"], got["hidden"], rtol=2e-2, atol=2e-3)


@edge
def near_deterministic_rows(place):
    hidden, weight, targets = make_inputs(place, 6, 5, 19, ignored=0, scale=200.0)
    check_both(place, hidden, weight, targets)


@edge
def ratios_that_overflow(place):
    hidden, weight, targets = make_inputs(place, 6, 5, 19, ignored=0)
    on = torch.ones(6, device=place.device, dtype=place.wide)
    old = torch.tensor([-1e4, 1e4, -200.0, -24.0, -19.0, -1.0]).to(on)
    for sign in (1.0, -1.0):
        got = check_policy(
            place, hidden, weight, targets, pg_weight=on * 1e-9, advantages=sign * on, old_logprobs=old,
            ref_logprobs=-old, kl_coef=0.1, behavior_logprobs=old.flip(0), clip_high=1e12,
        )  # fmt: skip
        assert got["ratio_sum"].isfinite() and got["approx_kl_sum"].isfinite()


@edge
def nan_where_nothing_counts(place):
    """NaN in the inputs of ignored rows, and in the policy inputs of rows with pg_weight 0, must not spread."""
    hidden, weight, targets = make_inputs(place, 12, 5, 19)
    terms = make_terms(place, 12)
    temperature = torch.ones(12, device=place.device, dtype=place.wide)
    dirty, dirty_temperature = dict(terms), temperature.clone()
    ignored = targets == -100
    dirty_temperature[ignored] = 1.0 if place.device == "cpu" else NAN  # refused on the CPU
    for name, value in terms.items():
        if isinstance(value, torch.Tensor):
            weightless = ignored | (terms["pg_weight"] == 0) & (
                name not in ("nll_weight", "entropy_weight", "pg_weight")
            )
            dirty[name] = torch.where(weightless, NAN, value)
    clean = check_policy(place, hidden, weight, targets, temperature=temperature, **terms)
    run = run_policy(
        linear_policy_loss, hidden, weight, targets, temperature=dirty_temperature, **dirty, backend=place.backend
    )
    for name, value in clean.items():
        assert torch.equal(run[name], value), name


def poisoned(hidden, rows):
    """Hidden states of these rows exchanged, in turn: NaN, ±inf, or so large that the logits are over 1e4."""
    poison = torch.tensor([NAN, INF, 3e4], device=hidden.device).to(hidden.dtype)
    poison = poison.repeat(len(hidden) // 3 + 1)[(rows.cumsum(0) - 1).clamp(min=0), None].expand_as(hidden).clone()
    poison[:, ::2] *= -1
    return torch.where(rows[:, None], poison, hidden)


def assert_same_results(got, clean, rows):
    """Every sum and gradient, bit by bit, and the per-token results of `rows`."""
    for name, value in clean.items():
        per_token = name in ("logprobs", "entropy")
        assert torch.equal(got[name][rows] if per_token else got[name], value[rows] if per_token else value), name


DEAD_HEADS = ({}, {"temperature": 0.7, "logit_softcap": 2.0, "bias": True})


def dead_inputs(place, h=6):
    """(hidden, weight, targets, ignored rows, rows without weight): each kind at both ends of a chunk and in its middle."""
    hidden, weight, targets = make_inputs(place, 12, h, 37, ignored=0)
    ignored, weightless = torch.zeros(2, 12, dtype=torch.bool, device=place.device)
    ignored[[0, 4, 5, 6, 11]], weightless[[1, 3, 8]] = True, True  # the chunk of rows 4 to 6 is ignored altogether
    return hidden, weight, targets.masked_fill(ignored, -100), ignored, weightless


def with_bias(place, head):
    bias = torch.linspace(-1, 1, 37, device=place.device).to(place.dtype)
    return head | {"bias": bias} if head.get("bias") else head


@edge
def dead_rows_reach_nothing_in_the_policy_loss(place):
    """NaN, inf or huge logits in rows that are ignored or have no weight: no gradient and no sum knows of them."""
    hidden, weight, targets, ignored, weightless = dead_inputs(place)
    terms = {**make_terms(place, 12), "nll_weight": torch.full((12,), 0.3, device=place.device, dtype=place.wide)}
    for name in ("nll_weight", "pg_weight", "entropy_weight"):
        terms[name] = torch.where(weightless, 0.0, terms[name])
    own = {"chunk_bytes": 8 * 37 * 3, "backend": place.backend}
    without_entropy = {name: value for name, value in terms.items() if name != "entropy_weight"}  # another path
    for terms, head in ((without_entropy, {}), *((terms, head) for head in DEAD_HEADS)):
        head = with_bias(place, head)
        check_policy(place, hidden, weight, targets, **terms, **head, chunk_bytes=own["chunk_bytes"])
        clean = run_policy(linear_policy_loss, hidden, weight, targets, **terms, **head, **own)
        definition = run_policy(linear_policy_loss_reference, hidden, weight, targets, **terms, **head)
        dirty = poisoned(hidden, ignored | weightless)
        got = run_policy(linear_policy_loss, dirty, weight, targets, **terms, **head, **own)
        assert_same_results(got, clean, ~weightless)
        got = run_policy(linear_policy_loss_reference, dirty, weight, targets, **terms, **head)
        assert_same_results(got, definition, ~weightless)
        assert (got["hidden"][ignored | weightless] == 0).all()
        assert (clean["hidden"][ignored | weightless] == 0).all() and clean["weight"].abs().max() > 0


@edge
def dead_rows_reach_nothing_in_the_logprobs(place):
    """As above; here a row without weight is one that a gradient of 0 arrives for. H = 64: in 16 bits the fused forward."""
    for h in (6, 64):
        hidden, weight, targets, ignored, weightless = dead_inputs(place, h)
        upstream = torch.rand(2, 12, generator=torch.Generator().manual_seed(7)).to(place.device, place.wide)
        upstream[:, weightless] = 0
        own = {"upstream": upstream, "chunk_bytes": 8 * 37 * 3, "backend": place.backend}
        for head in DEAD_HEADS:
            head = with_bias(place, head)
            clean = run_logprob(linear_logprob, hidden, weight, targets, **head, **own)
            definition = run_logprob(linear_logprob_reference, hidden, weight, targets, upstream=upstream, **head)
            dirty = poisoned(hidden, ignored | weightless)
            got = run_logprob(linear_logprob, dirty, weight, targets, **head, **own)
            assert_same_results(got, clean, ~weightless)
            dirty = poisoned(hidden, ignored)
            got = run_logprob(linear_logprob_reference, dirty, weight, targets, upstream=upstream, **head)
            assert_same_results(got, definition, ~weightless)
            assert (clean["hidden"][ignored | weightless] == 0).all() and clean["weight"].abs().max() > 0


@edge
def a_row_with_weight_that_is_nan_is_not_hidden(place):
    """What has weight and is NaN must show: the loss, its own gradient and dW."""
    hidden, weight, targets = make_inputs(place, 6, 5, 19, ignored=0)
    dirty = hidden.clone()
    dirty[2] = NAN
    on = torch.ones(6, device=place.device, dtype=place.wide)
    got = run_policy(linear_policy_loss, dirty, weight, targets, nll_weight=on, backend=place.backend)
    assert got["loss"].isnan() and got["hidden"][2].isnan().all() and got["weight"].isnan().all()
    assert got["hidden"][[0, 1, 3, 4, 5]].isfinite().all()
    got = run_logprob(linear_logprob, dirty, weight, targets, backend=place.backend)
    assert got["logprobs"][2].isnan() and got["hidden"][2].isnan().all() and got["weight"].isnan().all()


@edge
def gradients_scale_with_what_arrives(place):
    hidden, weight, targets = make_inputs(place, 6, 5, 19)
    arguments = {**make_terms(place, 6), "backend": place.backend}
    once = run_policy(linear_policy_loss, hidden, weight, targets, **arguments)
    thrice = run_policy(linear_policy_loss, hidden, weight, targets, upstream=3.0, **arguments)
    for name in ("hidden", "weight"):
        torch.testing.assert_close(thrice[name], 3 * once[name], rtol=2 * torch.finfo(place.dtype).eps, atol=0)


@edge
def second_run_has_the_same_bits(place):
    hidden, weight, targets = make_inputs(place, 17, 20, 300)
    terms = make_terms(place, 17)
    for run, op, options in ((run_policy, linear_policy_loss, terms), (run_logprob, linear_logprob, {})):
        first, second = (
            run(op, hidden, weight, targets, **options, chunk_bytes=8 * 300 * 5, backend=place.backend)
            for _ in range(2)
        )
        for name, value in first.items():
            assert torch.equal(value, second[name]), name


@edge
def chunk_size_changes_only_rounding(place):
    hidden, weight, targets = make_inputs(place, 17, 20, 300)
    terms = make_terms(place, 17)
    for run, op, options in ((run_policy, linear_policy_loss, terms), (run_logprob, linear_logprob, {})):
        runs = [
            run(op, hidden, weight, targets, **options, chunk_bytes=chunk_bytes, backend=place.backend)
            for chunk_bytes in (8 * 300, 8 * 300 * 7, None)
        ]
        for other in runs[1:]:
            for name, value in runs[0].items():
                eps = torch.finfo(value.dtype).eps
                torch.testing.assert_close(
                    other[name], value, rtol=64 * eps, atol=64 * eps * max(1, value.abs().max().item())
                )


@edge
def odd_shapes(place):
    for n, h, v in ((5, 1, 3), (3, 17, 1000), (2, 3, 1023), (4, 130, 4097)):
        check_both(place, *make_inputs(place, n, h, v), form="everything")


@edge
def vocabularies_of_real_models(place):
    for v in (151_936, 152_064, 248_320):
        hidden, weight, targets = make_inputs(place, 2, 4, v, ignored=0)
        targets[0] = v - 1
        check_logprob(place, hidden, weight, targets, chunk_bytes=8 * v)
        check_policy(place, hidden, weight, targets, **make_terms(place, 2), chunk_bytes=8 * v)


@edge
def hidden_that_is_a_slice(place):
    hidden, weight, targets = make_inputs(place, 12, 10, 19)
    wide = torch.randn(12, 25, device=place.device).to(place.dtype)
    wide[:, 3:23:2] = hidden
    sliced = wide[:, 3:23:2]
    assert not sliced.is_contiguous()
    terms = make_terms(place, 12)
    sliced.requires_grad_()
    plain_hidden, plain_weight, sliced_weight = leaf(hidden), leaf(weight), leaf(weight)
    linear_policy_loss(plain_hidden, plain_weight, targets, **terms, backend=place.backend).loss.backward()
    linear_policy_loss(sliced, sliced_weight, targets, **terms, backend=place.backend).loss.backward()
    for got, want in ((sliced.grad, plain_hidden.grad), (sliced_weight.grad, plain_weight.grad)):
        eps = torch.finfo(place.dtype).eps
        torch.testing.assert_close(got, want, rtol=4 * eps, atol=4 * eps)
    # Every second row of a longer batch, and per-token tensors that are slices too.
    doubled = torch.stack([hidden, hidden], 1).flatten(0, 1)[::2]
    spread = {
        name: torch.stack([x, x], 1).flatten()[::2] if isinstance(x, torch.Tensor) else x for name, x in terms.items()
    }
    other = run_policy(linear_policy_loss, doubled, weight, targets, **spread, backend=place.backend)
    want = run_policy(linear_policy_loss, hidden, weight, targets, **terms, backend=place.backend)
    torch.testing.assert_close(other["loss"], want["loss"])


@edge
def main_gradient_buffer(place):
    hidden, weight, targets = make_inputs(place, 9, 5, 19)
    terms = make_terms(place, 9)
    buffer = torch.full(weight.shape, 2.0, device=place.device, dtype=place.wide)
    want = run_policy(linear_policy_loss, hidden, weight, targets, **terms, backend=place.backend)
    own_hidden, own_weight = leaf(hidden), leaf(weight)
    for _ in range(2):
        out = linear_policy_loss(own_hidden, own_weight, targets, **terms, weight_grad=buffer, backend=place.backend)
        out.loss.backward()
    assert own_weight.grad is None
    eps = torch.finfo(place.dtype).eps
    torch.testing.assert_close(buffer, 2 + 2 * want["weight"].to(buffer), rtol=4 * eps, atol=4 * eps)
    torch.testing.assert_close(own_hidden.grad, 2 * want["hidden"], rtol=4 * eps, atol=4 * eps)


@edge
def frozen_parts_get_no_gradient(place):
    hidden, weight, targets = make_inputs(place, 9, 5, 19)
    terms = make_terms(place, 9)
    want = run_policy(linear_policy_loss, hidden, weight, targets, **terms, backend=place.backend)
    own_hidden, own_weight = leaf(hidden), leaf(weight)
    linear_policy_loss(own_hidden, weight, targets, **terms, backend=place.backend).loss.backward()
    linear_policy_loss(hidden, own_weight, targets, **terms, backend=place.backend).loss.backward()
    assert weight.grad is None and hidden.grad is None
    assert torch.equal(own_hidden.grad, want["hidden"]) and torch.equal(own_weight.grad, want["weight"])
    # Without gradients a kernel is another program, whose sums may be in another order.
    close = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)
    out = linear_policy_loss(hidden, weight, targets, **terms, backend=place.backend)
    assert not out.loss.requires_grad
    close(out.loss, want["loss"])
    buffer = torch.zeros(weight.shape, device=place.device, dtype=place.wide)
    with torch.no_grad():
        out = linear_policy_loss(own_hidden, own_weight, targets, **terms, weight_grad=buffer, backend=place.backend)
    assert not out.loss.requires_grad and (buffer == 0).all()
    close(out.loss, want["loss"])


@edge
def sums_add_up_over_micro_batches(place):
    hidden, weight, targets = make_inputs(place, 20, 5, 19)
    terms = make_terms(place, 20)

    def run(rows):
        own = {name: value[rows] if isinstance(value, torch.Tensor) else value for name, value in terms.items()}
        return linear_policy_loss(hidden[rows], weight, targets[rows], **own, backend=place.backend)

    whole, left, right = run(slice(0, 20)), run(slice(0, 7)), run(slice(7, 20))
    for name in whole._fields:
        got, a, b = getattr(whole, name), getattr(left, name), getattr(right, name)
        joined = torch.cat([a, b]) if a.dim() else torch.maximum(a, b) if name == "ratio_max" else a + b
        torch.testing.assert_close(got, joined, rtol=1e-5, atol=1e-5)
    assert whole.pg_tokens > 0 and whole.clipped_tokens > 0 and whole.kl_sum > 0


@edge
def logprobs_without_gradient(place):
    hidden, weight, targets = make_inputs(place, 12, 5, 19)
    want = run_logprob(linear_logprob, hidden, weight, targets, backend=place.backend)
    own_hidden = leaf(hidden)
    with torch.no_grad():
        logprobs, entropy = linear_logprob(own_hidden, weight, targets, with_entropy=False, backend=place.backend)
    assert entropy is None and not logprobs.requires_grad
    torch.testing.assert_close(logprobs, want["logprobs"], rtol=0, atol=1e-6)
    logprobs, entropy = linear_logprob(own_hidden, weight, targets, with_entropy=False, backend=place.backend)
    assert entropy is None and logprobs.requires_grad
    logprobs.sum().backward()
    upstream = torch.stack([torch.ones_like(logprobs), torch.zeros_like(logprobs)]).detach()
    both = run_logprob(linear_logprob, hidden, weight, targets, upstream=upstream, backend=place.backend)
    torch.testing.assert_close(own_hidden.grad, both["hidden"], rtol=1e-3, atol=1e-3)


@edge
def autocast_changes_nothing(place):
    hidden, weight, targets = make_inputs(place, 12, 5, 19)
    terms = make_terms(place, 12)
    want = run_policy(linear_policy_loss, hidden, weight, targets, **terms, backend=place.backend)
    want_logprob = run_logprob(linear_logprob, hidden, weight, targets, backend=place.backend)
    with torch.autocast(place.device, dtype=torch.bfloat16):
        got = run_policy(linear_policy_loss, hidden, weight, targets, **terms, backend=place.backend)
        got_logprob = run_logprob(linear_logprob, hidden, weight, targets, backend=place.backend)
    for name, value in want.items():
        assert torch.equal(got[name], value), name
    for name, value in want_logprob.items():
        assert torch.equal(got_logprob[name], value), name
