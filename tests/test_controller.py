"""The controllers: schedules, and the learned one on synthetic probes and on constructed problems."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from amft_fast import config_file, controller, gradient_noise
from amft_fast.multi_tensor import multi_tensor_dot

BASE = {
    "--train.steps": "11",
    "--controller.space": "mu",
    "--controller.signal": "balanced",
    "--controller.window": "10",
    "--controller.eta_mu": "0.3",
    "--controller.max_step": "0.05",
    "--controller.eta_entropy": "0.02",
}


def make(*flags, method="amft"):
    """A controller with small steps in mu itself, whatever the defaults are, and these flags."""
    settings = BASE | {"--train.method": method} | dict(zip(flags[::2], flags[1::2], strict=True))
    return controller.make(config_file.load(None, [x for pair in settings.items() for x in pair]))


def probe(c, u1, u2, g_sft, g_rl):
    """The sums that the engine's probe would give for these gradients at the controller's μ."""
    mu = c.value
    g1 = mu * g_sft
    total = g1 + (1 - mu) * g_rl
    t = lambda x: [torch.from_numpy(x)]  # noqa: E731
    return multi_tensor_dot([t(u1), t(u2)], t(g1), t(total)).tolist()


def window(c, step, halves, gradients, entropy=1.0, target=1.0):
    """Feeds one window of steps; returns the figures of the move and the next step."""
    figures = {}
    for _ in range(c.c.window):
        figures = c.observe(step, probe(c, *halves, *gradients(step)), 1.0, 1e-3, entropy, target)
        step += 1
    return figures, step


@pytest.mark.parametrize(
    ("method", "want"),
    [
        ("sft", (1, 1, 1)),
        ("rl", (0, 0, 0)),
        ("fixed", (0.5, 0.5, 0.5)),
        ("linear", (0.9, 0.5, 0.1)),
        ("cosine", (0.9, 0.5, 0.1)),
    ],
)
def test_schedules(method, want):
    c = make(method=method)
    assert [c.mu(t) for t in (0, 5, 10)] == pytest.approx(want)
    assert c.state_dict() == {}


def test_sft_then_rl_switches_once():
    c = make("--train.sft_share", "0.4", method="sft_then_rl")
    assert [c.mu(t) for t in range(11)] == [1.0] * 4 + [0.0] * 7


SIGNALS = ["balanced", "cosine", "rms", "raw"]


@pytest.mark.parametrize("space", ["mu", "logit"])
@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("helpful", ["sft", "rl"])
def test_mu_goes_towards_what_helps(signal, space, helpful):
    rng = np.random.default_rng(0)
    u = rng.normal(size=200)
    noise = lambda: rng.normal(size=200)  # noqa: E731
    good = lambda step: u + 0.5 * noise()  # noqa: E731
    bad = lambda step: noise()  # noqa: E731
    gradients = (lambda s: (good(s), bad(s))) if helpful == "sft" else (lambda s: (bad(s), good(s)))
    eta = "1" if signal != "raw" else "1000"
    # The synthetic probe has no AdamW moments, so the slope is SGD's.
    c = make(
        "--controller.signal", signal, "--controller.space", space, "--controller.eta_mu", eta,
        "--controller.max_step", "0.05" if space == "mu" else "0.3", "--meta.precondition", "none",
    )  # fmt: skip
    step, path = 0, [c.value]
    for _ in range(15):
        halves = [u + 0.5 * noise() for _ in range(2)]
        figures, step = window(c, step, halves, gradients)
        path.append(c.value)
    up = helpful == "sft"
    assert (path[-1] > 0.85) == up and (path[-1] < 0.15) == (not up), path
    assert (figures["controller/signal"] > 0) == up
    assert (figures["controller/cos_sft"] > 0.5) == up and (figures["controller/cos_rl"] > 0.5) == (not up)


def noise_ends(signal, gate):
    """Where μ ends, less where it began, after 30 windows of random rewards, for 20 seeds.

    u is then noise, the same for a whole window: its K values agree, and only its halves tell that it is noise.
    """
    ends = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        sft, rl = rng.normal(size=(2, 100))
        c = make(
            "--controller.signal", signal, "--controller.snr_gate", gate, "--controller.window", "1",
            "--controller.eta_mu", "0.3" if signal in ("balanced", "cosine") else "300", "--meta.precondition", "none",
        )  # fmt: skip
        step = 0
        for _ in range(30):
            _, step = window(c, step, rng.normal(size=(2, 100)), lambda s, a=sft, b=rl: (a, b))
        ends.append(c.value - 0.5)
    return np.array(ends)


@pytest.mark.parametrize("signal", SIGNALS)
def test_random_rewards_move_mu_by_nothing_under_the_gate(signal):
    gated, free = noise_ends(signal, "3"), noise_ends(signal, "0")
    assert abs(gated.mean()) < 0.02 and gated.std() < 0.03 and np.median(np.abs(gated)) < 0.005, gated
    assert free.std() > 0.1, "without the gate the same noise is a random walk, so this test can fail"


def test_useless_utility_leaves_mu_where_it_is():
    c = make("--controller.snr_gate", "0", "--controller.eta_entropy", "0")
    zero, g = np.zeros(50), np.ones(50)
    figures, _ = window(c, 0, (zero, zero), lambda s: (g, -g))
    assert c.value == 0.5 and figures["controller/signal"] == 0


def test_move_is_once_a_window_and_bounded():
    c = make(
        "--controller.window", "4", "--controller.max_step", "0.03", "--controller.eta_mu", "10",
        "--controller.eta_entropy", "0", "--controller.snr_gate", "0",
    )  # fmt: skip
    u = np.ones(50)
    sums = probe(c, u, u, u, -u)
    moves = [c.observe(t, sums, 1.0, 1e-3, 1.0, 1.0) for t in range(8)]
    assert [bool(m) for m in moves] == [False, False, False, True] * 2
    assert c.value == pytest.approx(0.56)


def test_entropy_pulls_towards_its_target():
    for entropy, sign in ((0.4, 1), (1.6, -1)):
        c = make("--controller.eta_entropy", "0.05", "--controller.window", "1", method="amft_no_meta")
        figures = c.observe(0, None, 1.0, 1e-3, entropy, 1.0)
        assert c.value == pytest.approx(0.5 + sign * 0.05 * 0.6)
        assert figures["controller/mu_meta"] == 0 and figures["controller/mu_entropy"] == pytest.approx(sign * 0.03)
        assert not c.probes(0) and not c.starts_window(0)


def test_entropy_is_the_mean_over_the_window_and_can_be_switched_off():
    c = make("--controller.window", "2", "--controller.eta_entropy", "0.1", method="amft_no_meta")
    c.observe(0, None, 1.0, 1e-3, 0.2, 1.0)
    assert c.observe(1, None, 1.0, 1e-3, 0.6, 1.0)["controller/entropy"] == pytest.approx(0.4)
    c = make("--controller.window", "1", "--controller.eta_entropy", "0.1", method="amft_no_entropy")
    u = np.ones(50)
    figures = c.observe(0, probe(c, u, u, u, u), 1.0, 1e-3, 0.0, 1.0)
    assert figures["controller/mu_entropy"] == 0 and c.value == 0.5


def test_mu_stays_strictly_inside_its_bounds_and_says_so():
    c = make(
        "--controller.eta_entropy", "5", "--controller.window", "1", "--controller.mu_max", "0.9", method="amft_no_meta"
    )
    for t in range(3):
        c.observe(t, None, 1.0, 1e-3, 0.0, 1.0)
    assert c.value == 0.9 and c.at_bound == 3


def test_nothing_moves_before_its_start():
    c = make("--controller.start_step", "5", "--controller.window", "5")
    assert not any(c.probes(t) or c.starts_window(t) for t in range(5)) and c.starts_window(5) and c.starts_window(10)
    assert c.observe(4, None, 1.0, 1e-3, 0.0, 9.0) == {} and c.value == 0.5


def test_random_control_has_the_size_of_balanced_and_a_sign_by_lot():
    u = np.ones(50)
    values = []
    for seed in range(12):
        c = make("--controller.signal", "random", "--controller.window", "1", "--run.seed", str(seed))
        values.append(c.observe(0, probe(c, u, u, u, -u), 1.0, 1e-3, 1.0, 1.0)["controller/signal"])
    assert {round(abs(v), 6) for v in values} == {2.0} and {v > 0 for v in values} == {True, False}


def test_a_probe_that_is_not_finite_is_left_out():
    c = make("--controller.window", "2", "--controller.snr_gate", "0")
    u = np.ones(50)
    c.observe(0, [math.nan] * len(probe(c, u, u, u, -u)), 1.0, 1e-3, 1.0, 1.0)
    figures = c.observe(1, probe(c, u, u, u, -u), 1.0, 1e-3, 1.0, 1.0)
    assert figures["controller/signal"] == pytest.approx(2.0) and c.value > 0.5


def test_state_goes_round_in_mid_window():
    u, rng = np.ones(50), np.random.default_rng(0)
    steps = [
        probe(make(), u, -u + rng.normal(size=50), u + rng.normal(size=50), rng.normal(size=50)) for _ in range(30)
    ]
    whole, cut = make("--controller.window", "4"), make("--controller.window", "4")
    for t in range(30):
        whole.observe(t, steps[t], 1.0, 1e-3, 0.3, 1.0)
        cut.observe(t, steps[t], 1.0, 1e-3, 0.3, 1.0)
        if t == 17:
            state = cut.state_dict()
            cut = make("--controller.window", "4")
            cut.load_state_dict(state)
    assert whole.state_dict() == cut.state_dict()


# ------------------------------------------------------------------------------------- a switch, and the noise of gradients


def switch(*flags):
    base = ["--train.method", "sft_then_rl", "--train.sft_stop", "saturation", "--train.steps", "100"]
    return controller.make(config_file.load(None, [*base, *flags]))


def test_imitation_ends_when_the_loss_of_held_out_demonstrations_has_stopped_falling():
    flags = ("--train.sft_check_every", "5", "--train.sft_patience", "2", "--train.sft_tolerance", "0.1")
    c = switch(*flags, "--train.sft_share", "0.9")
    assert [c.wants_validation(t, t) for t in (-5, 0, 1, 5)] == [False, True, False, True]
    seen = []
    for nll in (2.0, 1.5, 1.4, 1.3, 1.25, 1.24):  # 1.3 is under 0.9 times 1.5
        c.validated([np.array([-nll - 0.1, -nll]), np.array([-nll + 0.1])])
        seen.append(c.mu(0))
    assert seen == [1, 1, 1, 1, 1, 0]
    assert not c.wants_validation(30, 30)
    again = switch(*flags, "--train.sft_share", "0.9")
    again.load_state_dict(json.loads(json.dumps(c.state_dict())))
    assert again.mu(0) == 0 and again.best == c.best


def test_imitation_ends_after_its_share_at_the_latest():
    c = switch("--train.sft_share", "0.4")
    for nll in (5.0, 4.0, 3.0):
        c.validated([np.array([-nll - 0.1, -nll]), np.array([-nll + 0.1])])
    assert c.mu(38) == 1 and c.mu(41) == 0 and not c.wants_validation(50, 50)


def test_without_a_rule_the_share_alone_decides():
    assert type(controller.make(config_file.load(None, ["--train.method", "sft_then_rl"]))) is controller.Schedule


def test_mu_goes_to_the_least_noise():
    """Variances 1 and 3, apart by 2: μ* = 3 / (3 + 1 + 2)."""
    flags = ["--train.method", "gac", "--mixture.gac_max_step", "0.02", "--controller.mu_init", "0.4"]
    c = controller.make(config_file.load(None, [*flags, "--mixture.gac_every", "3"]))
    assert [c.wants_noise(t) for t in (-3, 0, 1, 3)] == [False, True, False, True]
    mus = [c.noise(4.0, 12.0, 2.0)["controller/mu_next"] for _ in range(8)]
    assert mus[:3] == pytest.approx([0.42, 0.44, 0.46]) and mus[-1] == pytest.approx(0.5)
    c.noise(4.0, 0.0, 2.0)  # all groups flat: nothing is known of the RL gradient
    assert c.value == pytest.approx(0.5)


def test_the_gradients_noise_is_averaged_over_time_and_saved():
    def make():
        flags = ["--train.method", "gac", "--mixture.gac_memory", "0.5", "--mixture.gac_max_step", "1"]
        return controller.make(config_file.load(None, flags))

    c = make()
    c.noise(4.0, 4.0, -1.0)  # variances 1 and 1; what is negative by chance counts 0
    assert c.value == pytest.approx(0.5)
    again = make()
    again.load_state_dict(json.loads(json.dumps(c.state_dict())))
    for one in (c, again):
        one.noise(4.0, 16.0, 2.0)
        # Weights 1/3 and 2/3: variances 1 and 3, apart by (−1 + 4)/3.
        assert one.value == pytest.approx(3 / (3 + 1 + 1))


def test_noise_of_two_halves_is_measured_on_the_gradients():
    """Against numbers: gradients of each half as an engine would give them."""
    g = [torch.tensor([1.0, 2.0]), torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0])]
    given = iter([[x] for x in g])
    engine = SimpleNamespace(take_gradient=lambda: next(given), all_reduce=lambda t: t, device="cpu")
    swept = []
    got = gradient_noise.measure([("s1", "r1"), ("s2", "r2")], swept.append, engine)
    assert swept == ["s1", "r1", "s2", "r2"]
    assert got == pytest.approx((1 + 4, 0.25 + 4, 0.5 * 2 + 3 * -1))
