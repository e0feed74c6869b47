"""Short runs with each loss: two updates a rollout, resumed in the middle where there is state."""

import pytest
from fakes import copy_run
from runs import lines, train, without_times

RUN = (
    *("--train.method", "rl", "--train.steps", "2", "--train.minibatches_per_rollout", "2", "--train.lr", "0.03"),
    *("--eval.at_start", "false", "--eval.num_samples", "1", "--rollout.num_generations", "4"),
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
def test_a_run(tmp_path, checkpoint_folder, flags):
    assert train(copy_run(tmp_path, checkpoint_folder, *RUN, *flags)) == 0
    records = lines(tmp_path)
    assert len(records) == 2 and records[-1]["skipped_total"] == 0
    assert any(r["grad_norm"] > 1e-4 for r in records)


def test_masked_answers_leave_the_loss(tmp_path, checkpoint_folder):
    """With one token an answer hardly any ends by itself, and none that does not is trained on."""
    flags = ("--advantage.truncated", "masked", "--rollout.max_new_tokens", "1", "--train.steps", "3")
    assert train(copy_run(tmp_path, checkpoint_folder, *RUN, *flags)) == 0
    for r in lines(tmp_path):
        assert r["truncated"] > 0.5 and ("pg_loss" in r) == (r["truncated"] < 1)


def test_the_steered_coefficient_is_recorded_and_resumed(tmp_path, checkpoint_folder):
    flags = (
        "--objective.entropy_target",
        "9",
        "--objective.entropy_step",
        "0.01",
        "--checkpoint.every",
        "1",
        "--checkpoint.keep_last",
        "3",
    )
    flags += ("--objective.entropy_coef", "0.001", "--train.steps", "3")
    assert train(copy_run(tmp_path / "whole", checkpoint_folder, *RUN, *flags)) == 0
    whole = lines(tmp_path / "whole")
    assert [r["entropy_coef"] for r in whole] == pytest.approx([0.001, 0.011, 0.021])
    assert train(copy_run(tmp_path / "cut", checkpoint_folder, *RUN, *flags)) == 0
    for step in (2, 3):
        (tmp_path / "cut" / "checkpoints" / f"step-{step:06d}" / "state.json").write_text("damaged")
    assert train(copy_run(tmp_path / "cut", checkpoint_folder, *RUN, *flags), resume=True) == 0
    assert without_times(lines(tmp_path / "cut")) == without_times(whole)
