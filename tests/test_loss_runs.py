"""Steps with each loss, two updates a rollout, taken up in the middle where there is state."""

import pytest
from fakes import copy_run
from runs import steps, taken_up, trainer_of

RUN = (
    *("--train.method", "rl", "--train.steps", "2", "--train.minibatches_per_rollout", "2", "--train.lr", "0.03"),
    *("--rollout.num_generations", "4"),
)


@pytest.mark.parametrize(
    "flags",
    [
        ("--objective.loss", "gspo", "--objective.denominator", "sequence", "--advantage.kind", "opo"),
        ("--objective.loss", "gmpo", "--objective.denominator", "constant", "--advantage.kind", "maxrl"),
        ("--objective.loss", "vespo", "--objective.correction", "icepop", "--advantage.kind", "gpg"),
        ("--objective.loss", "clip_cov", "--objective.cov_share", "0.2", "--advantage.truncated", "masked"),
        ("--objective.loss", "kl_cov", "--objective.kl_coef", "0.1", "--objective.kl_in", "reward"),
        ("--objective.loss", "dppo", "--objective.entropy_share", "0.2", "--advantage.length_penalty", "0.1"),
        ("--objective.loss", "sapo", "--objective.sequence_kl_max", "0.1", "--advantage.overlong_buffer", "2"),
        ("--advantage.rewards", '{"words": 1.0}', "--advantage.kind", "reinforce++_baseline"),
    ],
    ids=lambda f: f[1],
)
def test_steps(tmp_path, checkpoint_folder, flags):
    done = steps(trainer_of(copy_run(tmp_path, checkpoint_folder, *RUN, *flags)), 2)
    assert all(s.figures["skipped_total"] == 0 for s in done)
    assert any(s.figures["grad_norm"] > 1e-4 for s in done)


def test_masked_answers_leave_the_loss(tmp_path, checkpoint_folder):
    """With one token an answer hardly any ends by itself, and none that does not is trained on."""
    flags = ("--advantage.truncated", "masked", "--rollout.max_new_tokens", "1")
    for s in steps(trainer_of(copy_run(tmp_path, checkpoint_folder, *RUN, *flags)), 3):
        ended = [x.finish_reason == "stop" for x in s.drawn.samples]
        assert not all(ended) and ("pg_loss" in s.figures) == any(ended)


def test_the_steered_coefficient_is_recorded_and_taken_up(tmp_path, checkpoint_folder):
    flags = ("--objective.entropy_target", "9", "--objective.entropy_step", "0.01", "--objective.entropy_coef", "0.001")
    trainer = trainer_of(copy_run(tmp_path, checkpoint_folder, *RUN, *flags))
    first = steps(trainer, 2)
    other = taken_up(trainer)
    (third,), (again,) = steps(trainer, 1), steps(other, 1)
    assert [s.figures["entropy_coef"] for s in (*first, third)] == pytest.approx([0.001, 0.011, 0.021])
    assert third.figures == again.figures
