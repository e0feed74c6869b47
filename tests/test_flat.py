"""Rollouts that reach no gradient leave the update: the gradient is the same, and so are the means over all rollouts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes import CopyTask, make_checkpoint
from runs import cfg_for, lines, train
from transformers import AutoModelForCausalLM

from amft_fast import objective
from amft_fast.config import ObjectiveConfig, TrainConfig
from amft_fast.data.batch import micro_batches
from amft_fast.engine.local import LocalEngine
from amft_fast.interfaces import Sample
from amft_fast.model.figures import LeftOut, Update, read_updates
from amft_fast.model.policy import Policy


def rollouts(flat=(1, 3), groups=5, per=4, entropy=True):
    """Groups of answers with advantages; those of the groups `flat` are 0. Entropies are what the model would say."""
    rng, out = np.random.default_rng(0), []
    for g in range(groups):
        prompt = rng.integers(3, 14, 3 + g).tolist()
        for i in range(per):
            n = 2 + (g + i) % 4
            ids, logp = rng.integers(3, 14, n).tolist(), (-rng.random(n)).tolist()
            sample = Sample(prompt, ids, [1] * n, logp, 0, "stop", str(g), g, entropy=2.0 * n if entropy else None)
            sequence = objective.rollout_sequence(sample, 1.0)
            out.append(sequence.with_fields(advantages=0.0 if g in flat else rng.normal()))
    return out


def weighed(sequences, cfg, **kwargs):
    counts = objective.count_tokens([], sequences)
    return objective.weigh_rl(sequences, 0.7, counts, cfg, **kwargs)


def updated(model, sequences, cfg, packed, left_out=None):
    """(the gradient, the figures) of one update."""
    engine = LocalEngine(Policy(model, cfg), TrainConfig(lr=1e-9))
    outs = [engine.backward(b) for b in micro_batches(sequences, 30, packed)]
    gradient = torch.cat([g.flatten() for group in engine.groups for g in group.grad_views]).clone()
    sums, maxes = sum(o.sums for o in outs), torch.stack([o.maxes for o in outs]).amax(0)
    update = Update(sums, maxes, engine.step(), None, left_out or LeftOut())
    return gradient, read_updates([update], engine, False, False).record


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("loss", ["grpo", "cispo", "sapo"])
def test_the_gradient_is_that_of_all_rollouts(loss, packed, tmp_path):
    cfg, path = ObjectiveConfig(loss=loss), make_checkpoint(tmp_path)
    sequences = weighed(rollouts(), cfg)
    kept, left_out = objective.leave_out_flat(sequences, cfg)
    assert len(kept) == 12 and len(sequences) == 20
    load = lambda: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)  # noqa: E731
    want, all_of_them = updated(load(), sequences, cfg, packed)
    got, figures = updated(load(), kept, cfg, packed, left_out)
    assert want.norm() > 1e-3 and (got - want).norm() < 1e-6 * want.norm()
    assert figures["pg_loss"] == pytest.approx(all_of_them["pg_loss"], rel=1e-5)
    gone = sum(int(s.trained.sum()) for s in sequences) - sum(int(s.trained.sum()) for s in kept)
    assert figures["left_out"] == pytest.approx(gone / sum(int(s.trained.sum()) for s in sequences))


def test_the_entropy_is_what_the_engine_drew_from_or_what_its_tokens_say(tmp_path):
    cfg, read = ObjectiveConfig(), rollouts(flat=())
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint(tmp_path), dtype=torch.float32)
    for known in (True, False):
        sequences = weighed(rollouts(entropy=known), cfg)
        kept, left_out = objective.leave_out_flat(sequences, cfg)
        gone = [s for i, s in enumerate(sequences) if i // 4 in (1, 3)]
        tokens = sum(int(s.trained.sum()) for s in gone)
        drawn = 2.0 * tokens if known else -sum(s.fields["behavior_logprobs"][s.trained].sum() for s in gone)
        assert left_out.tokens == tokens and left_out.entropy == pytest.approx(drawn)
        _, figures = updated(model, kept, cfg, True, left_out)
        _, alone = updated(model, kept, cfg, True)
        rest = sum(int(s.trained.sum()) for s in kept)
        want = (alone["entropy"] * rest + drawn) / (rest + tokens)
        assert figures["entropy"] == pytest.approx(want) and len(read) == len(sequences)


@pytest.mark.parametrize(
    ("cfg", "weights", "fields"),
    [
        (ObjectiveConfig(entropy_coef=0.01), {}, {}),
        (ObjectiveConfig(), {"entropy_coef": 0.01}, {}),
        (ObjectiveConfig(), {"value_coef": 0.5}, {"returns": 1.0}),
        (ObjectiveConfig(kl_coef=0.1), {}, {"ref_logprobs": -1.0}),
        (ObjectiveConfig(loss="dro", ratio_penalty=0.1), {}, {}),
        (ObjectiveConfig(loss="my_loss.py:fn"), {}, {}),
        (ObjectiveConfig(), {}, {"token_weight": 1.0}),
    ],
    ids=["entropy", "steered entropy", "value", "kl", "ratio penalty", "own loss", "demonstrations"],
)
def test_what_any_other_term_trains_on_stays(cfg, weights, fields):
    sequences = weighed([s.with_fields(**fields) for s in rollouts()], cfg, **weights)
    kept, left_out = objective.leave_out_flat(sequences, cfg)
    assert len(kept) == len(sequences) and left_out == LeftOut()


def test_one_rollout_stays_where_all_are_flat():
    cfg = ObjectiveConfig()
    sequences = weighed(rollouts(flat=range(5)), cfg)
    kept, left_out = objective.leave_out_flat(sequences, cfg)
    shortest = min(len(s.ids) for s in sequences)
    assert [len(s.ids) for s in kept] == [shortest]
    assert left_out.tokens + int(kept[0].trained.sum()) == sum(int(s.trained.sum()) for s in sequences)
    assert objective.leave_out_flat([], cfg) == ([], LeftOut())


class Rarely(CopyTask):
    """Rewards in the groups of some prompts alone."""

    def start(self, item):
        episode = super().start(item)
        step = episode.step

        def judged(text):
            result = step(text)
            if hash_of(item.id) % 2:
                return replace(result, reward=0.0, info=result.info | {"success": False})
            return result

        episode.step = judged
        return episode


def hash_of(text):
    return sum(map(ord, text))


@pytest.mark.parametrize("method", ["rl", "amft"])
def test_a_run_is_the_same_with_and_without(method, tmp_path):
    model, records = make_checkpoint(tmp_path / "model"), []
    for skip in ("true", "false"):
        folder = tmp_path / skip
        flags = ("--train.method", method, "--train.skip_flat", skip, "--meta.prompts", "4", "--controller.window", "2")
        flags += ("--controller.signal", "balanced")
        assert train(cfg_for(folder, model, *flags), task=Rarely()) == 0
        records.append([r for r in lines(folder) if r["phase"] == "train"])
    assert max(r["left_out"] for r in records[0]) > 0 and {r["left_out"] for r in records[1]} == {0.0}
    for a, b in zip(*records, strict=True):
        for name in ("loss", "grad_norm", "pg_loss", "entropy", "reward", "success", "tokens", "mu"):
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-5), (name, a["step"])
