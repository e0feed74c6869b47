"""multi_tensor_dot against the definitions in extended precision, and its derivative against real optimizer steps."""

import numpy as np
import pytest
import torch
from tensor_lists import BF16, F32, F64, MIXTURES, SHAPES, adam_state, call, make_lists

from amft_fast import multi_tensor
from amft_fast.multi_tensor import (
    PROBE_SUMS,
    AdamState,
    mixing_slope,
    multi_tensor_dot,
    multi_tensor_dot_reference,
    named_sums,
)

pytestmark = pytest.mark.cpu_isa

MU = 0.3
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def wide(tensors):
    flat = [x.detach().cpu().double().reshape(-1).numpy() for x in tensors]
    return np.concatenate([*flat, np.zeros(0)]).astype(np.longdouble)


def from_definitions(lists, num_u, adam):
    """Each of `named_sums`' numbers and the sum of its terms' sizes, from g_SFT and g_RL in extended precision."""
    u1, u2, g1, total, m, v = (wide(x) for x in lists)
    sft, rl = g1 / np.longdouble(MU), (total - g1) / (1 - np.longdouble(MU))
    vectors = {"u1": u1, "u2": u2 if num_u == 2 else 0 * u2, "total": total, "sft": sft, "rl": rl, "d": sft - rl}
    pairs = [(a, b) for a in ("u1", "u2", "total") for b in ("sft", "rl", "d", "total")]
    pairs += [("u1", "u1"), ("u2", "u2"), ("u1", "u2"), ("sft", "sft"), ("rl", "rl"), ("sft", "rl"), ("d", "d")]
    out = {f"{a}_{b}": vectors[a] * vectors[b] for a, b in pairs}
    p = q = np.zeros_like(total)
    if adam is not None:
        b1, b2 = 1 - adam.beta1**adam.step, 1 - adam.beta2**adam.step
        g = float(adam.clip) * total
        mhat, root = (
            (adam.beta1 * m + (1 - adam.beta1) * g) / b1,
            np.sqrt((adam.beta2 * v + (1 - adam.beta2) * g**2) / b2),
        )
        p = (1 - adam.beta1) / (b1 * (root + adam.eps))
        with np.errstate(invalid="ignore"):
            second = mhat * (1 - adam.beta2) * g / (b2 * root * (root + adam.eps) ** 2)
        q = p - np.where(root == 0, 0, second)
    for name, diagonal in (("plain", p), ("exact", q)):
        for a in ("u1", "u2", "total"):
            out |= {f"{a}_{name}_{b}": vectors[a] * diagonal * vectors[b] for b in ("sft", "rl", "d", "total")}
        out |= {f"{name}_{b}_sq": (diagonal * vectors[b]) ** 2 for b in ("sft", "rl")}
    return {name: (x.sum(), np.abs(x).sum()) for name, x in out.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("num_u, with_adam", [(1, False), (2, False), (1, True), (2, True)])
@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_every_number_is_its_definition(mixture, num_u, with_adam, offset, device):
    lists = make_lists(mixture, device=device, offset=offset)
    adam = adam_state(lists) if with_adam else None
    want = from_definitions(lists, num_u, adam)
    for function in (multi_tensor_dot, multi_tensor_dot_reference):
        sums = call(function, lists, num_u, adam)
        assert sums.dtype == F64 and sums.shape == (len(PROBE_SUMS),) and sums.device.type == device
        got = named_sums(sums.tolist(), MU)
        assert got.keys() == want.keys()
        for name, (value, size) in want.items():
            assert abs(got[name] - value) <= 1e-12 * size, (function.__name__, name)


def test_the_built_library_is_what_is_tested():
    if "torch" in multi_tensor.backends()["cpu"]:
        pytest.skip(multi_tensor.backends()["cpu"])
    assert multi_tensor.backends()["cpu"].startswith("C++")


@pytest.mark.parametrize("device", DEVICES)
def test_a_squared_norm_is_right_where_its_parts_cancel(device):
    g1 = [torch.randn(1000, device=device)]
    total = [g1[0] * 1e-6]
    got = multi_tensor_dot([g1], g1, total)[PROBE_SUMS.index(("total", "total"))]
    assert float(got) == pytest.approx(float(total[0].double().square().sum()), rel=1e-13)


@pytest.mark.parametrize("device", DEVICES)
def test_same_bits_again_and_for_bf16_as_for_its_fp32_copy(device):
    lists = make_lists((BF16, BF16, BF16), device=device)
    first = call(multi_tensor_dot, lists, 2, adam_state(lists))
    assert torch.equal(first, call(multi_tensor_dot, lists, 2, adam_state(lists)))
    if device == "cpu":  # on CUDA other dtypes are added up in another order
        copies = [[x.float() for x in tensors] for tensors in lists]
        shifted = make_lists((BF16, BF16, BF16), offset=3)
        for same in (copies, shifted):
            assert torch.equal(first, call(multi_tensor_dot, same, 2, adam_state(same)))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("mixture", ["fp32", "mixed-within-lists"])
def test_every_instruction_set_gives_the_numbers(isa, mixture, monkeypatch):
    library = multi_tensor._library("cpu")
    monkeypatch.setenv("AMFT_CPU_ISA", isa)
    if isinstance(library, str) or library.amft_isa().decode() != isa:
        pytest.skip(f"no {isa} here")
    lists = make_lists(MIXTURES[mixture])
    for num_u, adam in ((1, None), (2, None), (1, adam_state(lists)), (2, adam_state(lists))):
        native = call(multi_tensor_dot, lists, num_u, adam)
        assert torch.allclose(native, call(multi_tensor_dot_reference, lists, num_u, adam), rtol=1e-11, atol=0)


def test_bits_do_not_depend_on_the_number_of_threads():
    lists = make_lists(shapes=[*SHAPES, (400_000,), (123_457,)])
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(call(multi_tensor_dot, lists, 2, adam_state(lists)))
    torch.set_num_threads(1)
    assert all(torch.equal(results[0], result) for result in results)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", [multi_tensor_dot, multi_tensor_dot_reference])
def test_nothing_gives_zeros_where_they_are_wanted(function, device):
    assert torch.equal(function([[]], [], []), torch.zeros(len(PROBE_SUMS), dtype=F64))
    got = function([[], []], [], [], AdamState([], [], 0.9, 0.99, 1e-8, 1), device=device)
    assert got.device.type == device and not got.any()
    empty = [[torch.zeros(0, 3, device=device)] for _ in range(3)]
    assert not function(empty[:1], *empty[1:]).any()


@pytest.mark.parametrize("device", DEVICES)
def test_clip_may_be_a_tensor(device):
    lists = make_lists(device=device)
    as_float = call(multi_tensor_dot, lists, 2, adam_state(lists, clip=0.25))
    for dtype in (F32, F64):
        for clip in (torch.tensor(0.25, dtype=dtype, device=device), torch.tensor([0.25], dtype=dtype)):
            assert torch.equal(as_float, call(multi_tensor_dot, lists, 2, adam_state(lists, clip=clip)))


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    lists = make_lists(device="cuda")
    adam = adam_state(lists, clip=torch.tensor(0.25, device="cuda"))
    want = call(multi_tensor_dot, lists, 2, adam)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = call(multi_tensor_dot, lists, 2, adam)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, want)


def test_the_fallback_serves_and_says_so(monkeypatch):
    lists = make_lists()
    native = call(multi_tensor_dot, lists, 2, adam_state(lists))
    monkeypatch.setenv("AMFT_NO_EXT", "1")
    multi_tensor._library.cache_clear()
    try:
        assert multi_tensor.backends()["cpu"] == "torch (switched off by AMFT_NO_EXT)"
        fallback = call(multi_tensor_dot, lists, 2, adam_state(lists))
        assert torch.equal(fallback, call(multi_tensor_dot_reference, lists, 2, adam_state(lists)))
        assert torch.allclose(fallback, native, rtol=1e-12, atol=0)
    finally:
        multi_tensor._library.cache_clear()


@pytest.mark.parametrize("function", [multi_tensor_dot, multi_tensor_dot_reference])
@pytest.mark.parametrize(
    "name, index, x, message",
    [
        ("g1", 2, None, r"g1\[2\] must be a dense tensor, got NoneType"),
        ("total", 0, torch.zeros(3).to_sparse(), r"total\[0\] must be a dense tensor, got .*sparse"),
        ("u2", 3, torch.zeros(8, 8).half(), r"u2\[3\] must be float32, bfloat16 or float64, got .*float16"),
        ("total", 1, torch.zeros(0, device="meta"), r"total\[1\] is on meta, u1\[0\] on cpu"),
        ("exp_avg", 3, torch.zeros(8, 9), r"exp_avg\[3\] has shape \(8, 9\), u1\[3\] has \(8, 8\)"),
        ("g1", 3, torch.zeros(64), r"g1\[3\] has shape \(64,\), u1\[3\] has \(8, 8\)"),
        ("exp_avg_sq", 3, torch.zeros(8, 8).T, r"exp_avg_sq\[3\] is not contiguous: .*strides \(1, 8\)"),
    ],
)
def test_bad_input_is_named(function, name, index, x, message):
    names = ("u1", "u2", "g1", "total", "exp_avg", "exp_avg_sq")
    lists = dict(zip(names, make_lists(shapes=[(3,), (0,), (), (8, 8)])))
    lists[name][index] = x
    adam = AdamState(lists["exp_avg"], lists["exp_avg_sq"], 0.9, 0.99, 1e-8, 1)
    with pytest.raises(ValueError, match=message):
        function([lists["u1"], lists["u2"]], lists["g1"], lists["total"], adam)


def test_bad_lists_and_arguments_are_named():
    u, g1, total, *state = make_lists()[1:]
    with pytest.raises(ValueError, match="total has 8 tensors, u1 has 9"):
        multi_tensor_dot([u], g1, total[1:])
    for us in ([], u, [u, u, u]):
        with pytest.raises(ValueError, match="u must hold one or two lists"):
            multi_tensor_dot(us, g1, total)
    cases = {"beta1": 1.0, "beta2": -0.1, "eps": 0.0, "step": 0, "clip": 0.0}
    for name, value in cases.items():
        adam = AdamState(*state, **({"beta1": 0.9, "beta2": 0.9, "eps": 1e-8, "step": 1} | {name: value}))
        with pytest.raises(ValueError, match=name):
            multi_tensor_dot([u], g1, total, adam)
    with pytest.raises(ValueError, match="clip must be one floating-point number"):
        multi_tensor_dot([u], g1, total, AdamState(*state, 0.9, 0.9, 1e-8, 1, torch.ones(2)))
    with pytest.raises(ValueError, match="mu must lie inside"):
        named_sums([0.0] * len(PROBE_SUMS), 1.0)
    with pytest.raises(ValueError, match="sums must hold 27"):
        named_sums([0.0], 0.5)
    with pytest.raises(ValueError, match="diagonal must be"):
        mixing_slope({}, diagonal="diag")


def step_through_optimizer(make_optimizer, sft, rl, mu, max_norm):
    """Parameters after warm-up steps and one along the mixed gradient at μ, in fp64; the optimizer's state before it."""
    generator = torch.Generator().manual_seed(1)
    parameters = [torch.nn.Parameter(torch.randn(x.shape, generator=generator, dtype=F64)) for x in sft]
    optimizer = make_optimizer(parameters)
    for _ in range(5):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator, dtype=F64)
        optimizer.step()
    keys = [key for key in optimizer.state[parameters[0]] if key != "step"]
    states = {key: [optimizer.state[p][key].clone() for p in parameters] for key in keys}
    for p, a, b in zip(parameters, sft, rl):
        p.grad = mu * a + (1 - mu) * b
    if max_norm:
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.step()
    return [p.detach() for p in parameters], states


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("max_norm", [None, 0.5], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_slope_is_the_derivative_through_a_real_step(optimizer, max_norm, device):
    """U(θ) = −⟨u, θ⟩ has u = ∇(−U) everywhere, so central differences over μ are all of the error."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(7,), (4, 5), (0,), (33,)]
    u, sft, rl = ([torch.randn(s, generator=generator, dtype=F64) for s in shapes] for _ in range(3))
    lr, betas, eps, h = 1e-3, (0.9, 0.99), 1e-8, 1e-5

    def make_optimizer(parameters):
        if optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=lr)
        return torch.optim.AdamW(parameters, lr=lr, betas=betas, eps=eps, weight_decay=0.1)

    def utility(mu):
        after, _ = step_through_optimizer(make_optimizer, sft, rl, mu, max_norm)
        return -float(sum((a * b).sum() for a, b in zip(u, after)))

    def to(tensors):
        return [x.to(device) for x in tensors]

    want = (utility(MU + h) - utility(MU - h)) / (2 * h)

    g1 = [MU * a for a in sft]
    total = [a + (1 - MU) * b for a, b in zip(g1, rl)]
    norm = float(torch.cat([x.flatten() for x in total]).norm())
    clip = min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0
    assert (clip < 1) == (max_norm is not None)
    adam, diagonal = None, None
    if optimizer == "adamw":
        _, states = step_through_optimizer(make_optimizer, sft, rl, MU, max_norm)
        adam = AdamState(to(states["exp_avg"]), to(states["exp_avg_sq"]), *betas, eps, step=6, clip=clip)
        diagonal = "exact"
    named = named_sums(multi_tensor_dot([to(u)], to(g1), to(total), adam).tolist(), MU)
    assert lr * mixing_slope(named, diagonal=diagonal, clip=clip) == pytest.approx(want, rel=1e-6)
    if optimizer == "adamw" and max_norm:
        # The projection outside P, which is the right order for SGD only; and P without its second term.
        outside = clip * (named["u1_exact_d"] - named["u1_total"] * named["total_exact_d"] / named["total_total"])
        plain = mixing_slope(named, diagonal="plain", clip=clip)
        for wrong in (outside, plain):
            assert abs(lr * wrong / want - 1) > 0.01
