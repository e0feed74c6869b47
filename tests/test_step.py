"""What the step decides by itself: learning rates, which rollouts may be drawn ahead, repeated prompts, signals, windows."""

import json
import signal
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from fakes import CopyTask, ScriptedEngine, make_checkpoint
from runs import cfg_for, lines, train
from transformers import AutoTokenizer

from amft_fast import config_file, controller
from amft_fast.interfaces import Sampling
from amft_fast.rollout import episodes
from amft_fast.rollout.encoder import Encoder
from amft_fast.run.build import build
from amft_fast.run.signals import SIGNALS, StopSignal
from amft_fast.trainer import Trainer


def at(step, *flags, tokens=0, updates=10**6):
    """A trainer at a step, as far as its clock and its learning rate look at it; its moments have seen so many updates."""
    cfg = config_file.load(None, ["--train.steps", "10", "--train.lr", "1.0", "--train.sft_lr", "0.5", *flags])
    trainer = SimpleNamespace(cfg=cfg, step=step, tokens=tokens, warmup_tokens=0, total=cfg.train.warmup_steps + 10)
    trainer.engine = SimpleNamespace(attempts=updates)
    trainer.clock = Trainer.clock.fget(trainer)
    return trainer


@pytest.mark.parametrize(
    ("step", "mu", "want"), [(0, 0.3, 1 / 4), (3, 0.3, 1), (0, 1, 1 / 8), (3, 1, 0.5), (9, 1, 0.5)]
)
def test_the_learning_rate_rises_for_imitation_too(step, mu, want):
    trainer = at(step, "--train.lr_warmup_steps", "4")
    assert Trainer.learning_rate(trainer, step, mu) == pytest.approx(want)


def test_the_learning_rate_rises_again_where_a_verdict_has_emptied_the_moments():
    """AdamW's first updates move every weight by the whole rate, whichever gradient they come from."""
    rates = [Trainer.learning_rate(at(6 + k, "--train.lr_warmup_steps", "3", updates=k), 6 + k, 0) for k in range(4)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 1])


@pytest.mark.parametrize(("schedule", "want"), [("linear", 0.55), ("cosine", 0.55), ("constant", 1.0)])
def test_the_schedule_holds_for_imitation_too(schedule, want):
    trainer = at(5, "--train.lr_schedule", schedule)
    assert Trainer.learning_rate(trainer, 5, 0.3) == pytest.approx(want)
    assert Trainer.learning_rate(trainer, 5, 1) == pytest.approx(want / 2)


def test_the_warm_up_is_a_stage_of_its_own():
    """Four steps of it: they rise over two, then fall along their own line; the steps after it begin anew."""
    flags = ("--train.warmup_steps", "4", "--train.lr_warmup_steps", "2", "--train.lr_schedule", "linear")
    rates = [Trainer.learning_rate(at(step, *flags), step - 4, 1 if step < 4 else 0.3) for step in range(7)]
    want = [0.5 * 0.5, 0.5 * 0.775, 0.5 * 0.55, 0.5 * 0.325, 1.0 * 0.5, 0.91, 0.82]
    assert rates == pytest.approx(want)


def test_rollouts_ahead_go_on_past_the_steps_where_tokens_are_what_ends_a_run():
    ahead = ("--rollout.async_steps", "3", "--rollout.engine", "vllm", "--rollout.vllm.mode", "server")
    last = [Trainer.last_ahead(at(step, *ahead), 0.5) for step in (5, 6, 7, 8, 9)]
    assert last == [8, 9, 9, 9, 9]
    assert Trainer.last_ahead(at(30, *ahead, "--train.token_budget", "1000", tokens=10), 0.5) == 33
    assert Trainer.last_ahead(at(3, *ahead), 1.0) == 3, "a step that only imitates draws none"


def test_a_prompt_that_comes_twice_draws_other_samples_the_second_time(tmp_path):
    """As at the border of two passes over the prompts, or with fewer problems than prompts in a step."""
    encoder, task = Encoder(AutoTokenizer.from_pretrained(make_checkpoint(tmp_path))), CopyTask()
    a, b = task.prompts("train")[:2]

    def seeds(items):
        engine = ScriptedEngine([[5, 1]] * 50)
        episodes.run(
            engine, task, items, encoder, Sampling(stop_token_ids=(1,)), num_generations=3, max_new_tokens=4,
            seed_parts=(0, "x"),
        )  # fmt: skip
        return [r.seed for r in engine.asked]

    assert len(set(seeds([a, b, a, a]))) == 12
    assert seeds([a, b, a])[:6] == seeds([a, b]), "what comes once, or first, draws what it always drew"
    assert seeds([b, a, a])[3:6] == seeds([a, b])[:3], "wherever it stands"


def test_a_run_of_few_problems_has_groups_that_differ(tmp_path, checkpoint_folder):
    flags = ("--train.prompts_per_step", "16", "--log.samples", "16", "--log.samples_every", "1", "--train.steps", "1")
    assert train(cfg_for(tmp_path, checkpoint_folder, *flags, "--train.method", "rl", "--train.warmup_steps", "0")) == 0
    first = {}
    for kept in lines(tmp_path, "samples.jsonl"):
        first.setdefault(kept["prompt"], []).append(kept["completion"])
    assert max(len(set(completions)) for completions in first.values()) > 1


def test_signal_handlers_are_given_back():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with StopSignal() as stop:
        # What is ignored stays so, as nohup wants it.
        taken = [n for n in SIGNALS if n == signal.SIGINT or before[n] is not signal.SIG_IGN]
        assert all(signal.getsignal(number) != before[number] for number in taken) and not stop()
        signal.raise_signal(signal.SIGTERM)
        assert stop() and stop.exit_code == 128 + signal.SIGTERM
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


def test_a_run_in_another_thread_leaves_signals_alone_and_can_be_stopped(tmp_path, checkpoint_folder):
    found, codes = [], []

    def work():
        with StopSignal() as stop:
            found.append(signal.getsignal(signal.SIGINT))
            stop.request(signal.SIGTERM)
            codes.append(stop.exit_code)
        codes.append(train(cfg_for(tmp_path, checkpoint_folder, "--train.steps", "1", "--train.warmup_steps", "0")))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before] and codes == [143, 0]
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 1


def test_an_entropy_that_is_not_finite_does_not_reach_mu():
    flags = ["--train.method", "amft_no_meta", "--controller.window", "2", "--controller.eta_entropy", "0.5"]
    c = controller.make(config_file.load(None, flags))
    c.observe(0, None, 1.0, 1e-3, float("nan"), 1.0)
    figures = c.observe(1, None, 1.0, 1e-3, 0.4, 1.0)
    assert figures["controller/entropy"] == pytest.approx(0.4) and 0 < c.value < 1
    mu = c.value
    for step in (2, 3):
        c.observe(step, None, 1.0, 1e-3, float("nan"), 1.0)
    assert c.value == mu, "a window that saw nothing moves nothing"


@pytest.mark.parametrize(("method", "built"), [("amft", True), ("amft_no_meta", False), ("gac", False)])
def test_a_utility_gradient_is_built_where_it_is_read(tmp_path, checkpoint_folder, method, built):
    cfg = cfg_for(tmp_path, checkpoint_folder, "--train.method", method, "--controller.signal", "balanced")
    assert (Trainer(cfg, build(cfg, lambda: False)).utility_gradient is not None) == built


STOPPED = {
    "windows": (
        *("--train.method", "amft", "--controller.signal", "balanced", "--meta.prompts", "2"),
        *("--objective.kl_coef", "0.1"),
    ),
    "blocks": ("--train.method", "amft", "--controller.look_prompts", "2"),
    "gac": ("--train.method", "gac", "--mixture.gac_every", "1"),
    "saturation": (
        *("--train.method", "sft_then_rl", "--train.sft_stop", "saturation", "--train.sft_check_every", "1"),
        *("--meta.prompts", "2"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("flags", STOPPED.values(), ids=STOPPED)
def test_a_stop_at_any_question_leaves_no_trace_of_the_step(tmp_path, checkpoint_folder, flags):
    """Between micro-batches, prompts and tokens: the state is as it was, and the step, done after all, the undisturbed one."""
    cfg = cfg_for(tmp_path, checkpoint_folder, "--train.micro_batch_tokens", "12", "--train.warmup_steps", "0", *flags)
    places: list[str] = []  # who has asked in this step
    stop_at = [-1]

    def should_stop() -> bool:
        frame = sys._getframe(2)
        places.append(frame.f_code.co_name)
        return len(places) - 1 == stop_at[0]

    def trainer(asked):
        made = Trainer(cfg, build(cfg, asked, CopyTask()))
        made.after_warmup()
        return made

    disturbed, whole = trainer(should_stop), trainer(lambda: False)
    broken = set()
    for _ in range(2):
        stop_at[0] = 0
        while True:
            places.clear()
            before, weights = json.dumps(disturbed.state_dict()), {k: v.clone() for k, v in disturbed.tensors().items()}
            try:
                step = disturbed.train_step()
                break
            except InterruptedError:
                broken.add(places[-1])
                now = disturbed.state_dict()
                kept = {"looked", "updates", "controller", "utility_weight", "utility_at", "utility_figures", "cache"}
                for name, value in json.loads(before).items():
                    assert name in kept or json.loads(json.dumps(now[name])) == value, (name, places)
                same = (
                    torch.equal(v, disturbed.tensors()[k]) for k, v in weights.items() if not k.startswith("utility")
                )
                taken_back = now["controller"] != json.loads(before)["controller"]  # by a look, which stays
                assert (taken_back or all(same)) and not any(g.grad.any() for g in disturbed.engine.groups)
            stop_at[0] += 1
        undisturbed = whole.train_step()
        assert step.figures == undisturbed.figures and step.tokens == undisturbed.tokens
    assert {"_decode", "batches"} <= broken or flags[1] == "sft_then_rl"
    assert all(torch.equal(v, whole.tensors()[k]) for k, v in disturbed.tensors().items())
