"""On-policy distillation: a token's advantage is the teacher's log-prob less the policy's."""

import json

import numpy as np
import plain_losses as plain
import pytest
import torch
from fakes import copy_run, make_checkpoint
from runs import steps, trainer_of
from transformers import AutoModelForCausalLM

from amft_fast import config_file, objective
from amft_fast.config import AdvantageConfig
from amft_fast.errors import UserError
from amft_fast.interfaces import Sample
from amft_fast.run.build import build

RUN = ("--train.method", "rl", "--advantage.kind", "distill", "--rollout.num_generations", "4")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("teacher"), hidden=24, seed=1)


def samples():
    return [Sample([2, 5], [6, 7, 1], [1, 0, 1], [-1.0, 0.0, -0.5], 0, "stop", "p", 0, reward=r) for r in (1.0, 0.0)]


@pytest.mark.parametrize(("kind", "base"), [("distill", 0.0), ("dr_grpo", 0.5)])
def test_what_the_teacher_adds(kind, base):
    drawn = samples()
    rl = [objective.rollout_sequence(s, 1.0) for s in drawn]
    objective.set_advantages(rl, drawn, AdvantageConfig(kind=kind, teacher="t", teacher_coef=0.5), 8)
    rl[0].fields["teacher_logprobs"] = np.array([0, 0, -0.2, 0, -2.0])
    objective.add_teacher(rl[:1], 0.5)
    assert rl[0].fields["advantages"][rl[0].trained] == pytest.approx([base + 0.4, base - 0.75])


def test_the_trainer_takes_them_from_the_teacher(tmp_path, checkpoint_folder, teacher):
    """Through the parts of a run, at the temperature of the rollouts, against plain logits."""
    flags = ("--advantage.teacher", str(teacher), "--rollout.temperature", "0.8")
    parts = build(copy_run(tmp_path, checkpoint_folder, *RUN, *flags), lambda: False)
    from amft_fast.scoring import Scorer

    scorer = Scorer(copy_run(tmp_path, checkpoint_folder, *RUN, *flags), parts.engine, parts.policy, parts.teacher)
    drawn = samples()
    (a, _) = scorer.judge(drawn)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    with torch.no_grad():
        logp, _ = plain.plain_tokens(model, a.ids, 0.8)
    want = logp.numpy()[[1, 3]] - np.array([-1.0, -0.5])
    assert a.fields["advantages"][a.trained] == pytest.approx(want, abs=1e-5)
    assert not any(p.requires_grad for p in parts.teacher.parameters())


def test_steps_come_nearer_to_the_teacher(tmp_path, checkpoint_folder, teacher):
    flags = ("--advantage.teacher", str(teacher), "--train.steps", "40", "--train.lr", "0.03")
    trainer = trainer_of(copy_run(tmp_path, checkpoint_folder, *RUN, *flags))
    assert steps(trainer, 40)[-1].figures["skipped_total"] == 0
    models = [AutoModelForCausalLM.from_pretrained(f) for f in (teacher, checkpoint_folder)]
    with torch.no_grad():
        ids = torch.tensor([[2, word, 3] for word in (5, 6, 7, 8)])
        t, *others = [m(ids).logits[:, -1].log_softmax(-1) for m in (*models, trainer.policy.model)]
        apart = [(o.exp() * (o - t)).sum(-1).mean().item() for o in others]
    assert apart[1] < 0.5 * apart[0], "the reverse KL to it, at the first token of an answer"


def test_a_teacher_of_other_tokens_is_refused(tmp_path, checkpoint_folder, teacher):
    file = teacher / "tokenizer.json"
    kept = file.read_text()
    words = json.loads(kept)
    words["model"]["vocab"]["other"] = words["model"]["vocab"].pop("f")
    file.write_text(json.dumps(words))
    try:
        with pytest.raises(UserError, match="has another tokenizer than"):
            build(copy_run(tmp_path, checkpoint_folder, *RUN, "--advantage.teacher", str(teacher)), lambda: False)
    finally:
        file.write_text(kept)
    with pytest.raises(UserError, match="kind distill needs a teacher, got none"):
        config_file.load(None, ["--advantage.kind", "distill"])
    with pytest.raises(UserError, match="kind must not be gae"):
        config_file.load(None, ["--advantage.kind", "gae", "--advantage.teacher", "x"])
