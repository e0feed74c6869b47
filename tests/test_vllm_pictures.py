"""The real vLLM on a CPU, given pictures: in the trainer's process and as a server, with weights synchronised in place."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_vlm import make_vlm
from vllm_cases import GREEDY, assert_answers_as, named, shake

pytest.importorskip("vllm", reason="needs vLLM: make test-integration has an environment with it")
pytest.importorskip("torchvision", reason="needs torchvision: make test-integration puts it on PYTHONPATH")

from amft_fast.config import ModelConfig, VllmConfig
from amft_fast.errors import UserError
from amft_fast.interfaces import Request
from amft_fast.model.policy import load_model
from amft_fast.model.vision import load_vision
from amft_fast.rollout import vllm
from amft_fast.rollout.vllm.groups import RequestGroup, check_prompt
from amft_fast.rollout.vllm.setup import Setup

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
CPU = torch.device("cpu")
# Of the second one `max_pixels` leaves a half: what the trainer's processor makes of it, vLLM's must make as well.
PICTURES = [Image.fromarray(np.random.default_rng(w).integers(0, 256, (16, w, 3), np.uint8)) for w in (16, 32, 24)]


@pytest.fixture(scope="module", params=[("qwen2_5_vl", "colocate"), ("qwen3_vl", "server")], ids="-".join)
def seeing(request, tmp_path_factory):
    """A model, its eyes, and an engine."""
    kind, mode = request.param
    folder = make_vlm(tmp_path_factory.mktemp(kind), kind, head=32)
    settings = ModelConfig(path=str(folder), max_pixels=400)
    model, vision = load_model(settings, CPU), load_vision(settings)
    cfg = VllmConfig(mode=mode, bucket_bytes=4096, kv_cache_bytes=16 << 20, max_num_seqs=64, call_timeout_s=60)
    engine = vllm.make(Setup(cfg, model, str(folder), CPU, folder, image_size=dict(vision.processor.size)))
    yield model, vision, engine
    engine.close()


def requests(vision, n):
    """Two samples of each prompt: of one picture, of two, and of none."""
    shown = [PICTURES[:1], PICTURES[1:], []]
    out = []
    for i in range(n):
        images = shown[i // 2 % 3]
        prompt = vision.expand([2, 8 + i // 2, *[5, vision.image_token, 7] * len(images), 3], images)
        out.append(Request(tuple(prompt), 100 + i, 8, tuple(images)))
    return out


def test_after_each_sync_it_sees_and_answers_as_the_trainer_does(seeing):
    """Eyes are sent like all else, and what old eyes saw is forgotten."""
    model, vision, engine = seeing
    seen = set()
    for version in range(3):
        if version:
            shake(model, version)
        engine.sync(named(model), version)
        got = assert_answers_as(engine, model, requests(vision, 6), vision)
        assert {c.weight_version for c in got} == {version}
        seen.add(tuple(got[0].logprobs))
    assert len(seen) == 3


def test_another_picture_is_another_prompt(seeing):
    _, vision, engine = seeing
    first, *_ = requests(vision, 1)
    other = Request(first.prompt_ids, first.seed, 8, (Image.new("RGB", (16, 16), "red"),))
    a, b = engine.generate([first, other], GREEDY)
    assert a.logprobs != b.logprobs


def test_a_picture_of_another_size_is_told(seeing):
    """An engine that was started by somebody else may have another processor."""
    group = RequestGroup((2, 5, 6, 6, 7, 3), 0, 8, tuple(PICTURES[:1]), (0,))
    with pytest.raises(UserError, match="reads 5 tokens where the trainer reads 6"):
        check_prompt([2, 5, 6, 7, 3], group)
