"""Which weights drew which token: over turns, in checkpoints and between ranks, as figures, and in the loss."""

import json
import pickle
from dataclasses import asdict, replace

import numpy as np
import pytest
from fakes import CopyTask, ScriptedEngine, make_checkpoint
from transformers import AutoTokenizer

from amft_fast import config_file, objective
from amft_fast.config import ObjectiveConfig
from amft_fast.errors import UserError
from amft_fast.interfaces import Sample, Sampling
from amft_fast.rollout import episodes
from amft_fast.rollout.ahead import sample_of
from amft_fast.rollout.encoder import Encoder
from amft_fast.rollout.rollouts import pack
from amft_fast.run.figures import staleness_figures


class Changing(ScriptedEngine):
    """Its weights are changed in the midst of each answer: the first token is of the version before."""

    version = 3

    def generate(self, requests, sampling):
        out = []
        for completion in super().generate(requests, sampling):
            runs = ((self.version, 1), (self.version + 1, len(completion.token_ids) - 1))
            out.append(replace(completion, weight_version=self.version, versions=runs))
        self.version += 1
        return out


def spanning(versions):
    """A sample of five own tokens in two turns, with two of the verifier's between them."""
    return Sample(
        [2, 5, 3], [7, 8, 9, 2, 3, 6, 1], [1, 1, 1, 0, 0, 1, 1], [-0.5] * 7, 3, "stop", "p", 0, versions=versions
    )


def test_a_sample_knows_the_versions_of_its_tokens_over_turns(tmp_path):
    encoder = Encoder(AutoTokenizer.from_pretrained(make_checkpoint(tmp_path)))
    task, engine = CopyTask(max_turns=2), Changing([[9, 9, 1], [5, 1]])
    sampling = Sampling(stop_token_ids=(1,))
    items, seed = task.prompts("train")[:1], (0, "x")
    (sample,) = episodes.run(
        engine, task, items, encoder, sampling, num_generations=1, max_new_tokens=4, seed_parts=seed
    )
    assert sample.runs == [(3, 1), (4, 3), (5, 1)] and sample.weight_version == 3, "4 is one run over both turns"
    assert sum(count for _, count in sample.runs) == sum(sample.loss_mask)


def test_samples_without_runs_are_of_one_version():
    assert spanning([]).runs == [(3, 5)]


def test_versions_survive_a_checkpoint_and_cost_next_to_nothing_between_ranks():
    sample = spanning([(3, 2), (5, 3)])
    assert sample_of(json.loads(json.dumps(asdict(sample) | sample.lists()))) == sample
    ids = list(range(4000))
    long = Sample([1], ids, [1] * 4000, [-0.5] * 4000, 3, "stop", "p", 0)
    with_runs = replace(long, versions=[(3, 1000), (4, 3000)])
    sizes = [len(pickle.dumps(pack([s]))) for s in (long, with_runs)]
    assert pack([with_runs])[0].versions == with_runs.versions and sizes[1] - sizes[0] < 40 and sizes[1] < 14 * 4000


def test_figures_of_age_are_by_token():
    samples = [spanning([(3, 2), (5, 3)]), spanning([(5, 5)])]
    figures = staleness_figures(samples, 6, 2)
    assert figures == {"staleness_mean": (2 * 3 + 8) / 10, "staleness_max": 3, "spanning": 0.5, "too_old": 0.2}
    assert "too_old" not in staleness_figures(samples, 6) and staleness_figures([], 6) == {}


def test_tokens_over_the_age_have_no_weight_and_count_in_the_denominator():
    sequence = objective.rollout_sequence(spanning([(3, 2), (5, 3)]), 1.0, oldest=4)
    (weighed,) = objective.weigh_rl([sequence], 0.5, objective.count_tokens([], [sequence]), ObjectiveConfig())
    assert weighed.fields["pg_weight"][sequence.trained].tolist() == pytest.approx([0, 0, 0.1, 0.1, 0.1])
    whole = objective.rollout_sequence(spanning([(3, 2), (5, 3)]), 1.0)
    assert "fresh" not in whole.fields and np.array_equal(whole.trained, sequence.trained)


def test_an_age_that_leaves_nothing_out_is_refused():
    served = ["--rollout.engine", "vllm", "--rollout.vllm.mode", "server", "--rollout.async_steps", "4"]
    assert config_file.load(None, [*served, "--objective.max_staleness", "3"]).objective.max_staleness == 3
    with pytest.raises(UserError, match=r"max_staleness must be below rollout\.async_steps.* got 4 and 4"):
        config_file.load(None, [*served, "--objective.max_staleness", "4"])
