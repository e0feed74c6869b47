"""Samples as many ranks hold them: arrays in place of lists."""

import json
import pickle
import tracemalloc

import numpy as np
import pytest

from amft_fast import objective
from amft_fast.interfaces import Sample, Turn
from amft_fast.rollout.ahead import Ahead
from amft_fast.rollout.rollouts import pack


def samples(count=3, length=7):
    rng, prompt = np.random.default_rng(0), [7, 150_000, 9]
    return [
        Sample(
            prompt,
            rng.integers(0, 150_000, length).tolist(),
            [1] * (length - 2) + [0, 1],
            rng.normal(size=length).tolist(),
            3,
            "stop",
            "p",
            0,
            turns=[Turn(length, 1.0, "s")],
            reward=1.0,
            text="answer",
        )
        for _ in range(count)
    ]


def test_packed_samples_are_read_as_lists_are():
    plain = samples()
    packed = pickle.loads(pickle.dumps(pack(plain)))
    assert all(p.prompt_ids is packed[0].prompt_ids for p in packed), "one prompt for all of its answers"
    for a, b in zip(plain, packed):
        assert a.lists() == b.lists() and sum(a.loss_mask) == sum(b.loss_mask)
        one, two = (objective.rollout_sequence(s, 1.0) for s in (a, b))
        assert np.array_equal(one.ids, two.ids) and np.array_equal(one.trained, two.trained)
        assert np.array_equal(one.fields["behavior_logprobs"], two.fields["behavior_logprobs"])
        demo = objective.demo_sequence(b.prompt_ids, b.response_ids[:2])
        assert demo.ids.tolist() == [*a.prompt_ids, *a.response_ids[:2]]


def test_what_a_checkpoint_holds_of_them_is_the_same():
    drawn = []
    for found in (samples(), pack(samples())):
        ahead = Ahead(1)
        ahead.start(1, 0, lambda found=found: found)
        ahead.wait()
        drawn.append(json.dumps(ahead.queue[0].state_dict()))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(("packing", "low", "high"), [(list, 60, 120), (pack, 12, 16)])
def test_a_token_of_another_rank_takes_14_bytes_and_not_80(packing, low, high):
    data = pickle.dumps(packing(samples(4, 20_000)))
    tracemalloc.start()
    kept = pickle.loads(data)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert low < size / sum(len(s.response_ids) for s in kept) < high
