"""Vision-language policies: places and positions of images, losses and gradients, rollouts, for three real architectures."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_vlm import IMAGE, KINDS, SEE, SEEN, SHUT, make_vlm

from amft_fast import objective
from amft_fast.config import ModelConfig, ObjectiveConfig
from amft_fast.data.batch import collate, micro_batches
from amft_fast.errors import UserError
from amft_fast.interfaces import Demo, Item, Message, Request, Sampling, StepResult
from amft_fast.meta_gradient import RolloutCache, RolloutGroup
from amft_fast.model.policy import Policy, load_model, load_tokenizer
from amft_fast.model.vision import load_vision, mrope_positions
from amft_fast.rollout.encoder import Encoder
from amft_fast.rollout.episodes import run
from amft_fast.rollout.transformers import TransformersEngine

pytestmark = pytest.mark.cpu_isa

QWEN = ("qwen2_5_vl", "qwen3_vl")
CPU = torch.device("cpu")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


PICTURES = [noise(16, 8, 1), noise(24, 16, 2), noise(16, 16, 3)]


class Eyes:
    """One checkpoint with all that belongs to it."""

    def __init__(self, folder, **settings):
        cfg = ModelConfig(path=str(folder), **settings)
        self.vision = load_vision(cfg)
        self.model = load_model(cfg, CPU).double()
        self.encoder = Encoder(load_tokenizer(cfg), self.vision)
        self.policy = Policy(self.model, ObjectiveConfig(entropy_coef=0.1), vision=self.vision)
        self.engine = TransformersEngine(self.model, vision=self.vision)

    def prompt(self, text: str, *images) -> list[int]:
        return self.encoder.prompt([Message("user", text, images)])

    def demos(self) -> list:
        """Sequences with two images, one and none."""
        shown = [("a b", "c d", PICTURES[:2]), ("b", "e", PICTURES[2:]), ("c d", "a b c", [])]
        return [
            objective.demo_sequence(*self.encoder.demo(Demo(t, (Message("user", t, tuple(i)),), r))).with_fields(
                nll_weight=1.0
            )
            for t, r, i in shown
        ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: make_vlm(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def all_eyes(folders):
    return {kind: Eyes(folder) for kind, folder in folders.items()}


@pytest.fixture(params=KINDS)
def eyes(request, all_eyes):
    return all_eyes[request.param]


@pytest.fixture(params=QWEN)
def qwen(request, all_eyes):
    return all_eyes[request.param]


# ------------------------------------------------------------------------------------------------------------ in the prompt


def test_an_image_takes_as_many_tokens_as_its_patches_give(qwen):
    assert [qwen.vision.tokens(p) for p in PICTURES] == [2, 6, 4]
    ids = qwen.prompt("a", *PICTURES[:2])
    text = qwen.encoder.tokenizer.convert_ids_to_tokens(ids)
    see = [SEE, *[SEEN] * 2, SHUT, SEE, *[SEEN] * 6, SHUT]
    assert text == ["<user>", *see, "a", "<answer>"]


def test_with_cross_attention_an_image_takes_one_token(all_eyes):
    assert all_eyes["mllama"].prompt("a", *PICTURES).count(all_eyes["mllama"].vision.image_token) == 3


def test_prompts_of_the_same_words_and_other_sizes_differ(qwen):
    assert len(qwen.prompt("a", PICTURES[0])) + 4 == len(qwen.prompt("a", PICTURES[1]))


def test_an_image_for_a_model_without_eyes_is_refused(checkpoint_folder):
    cfg = ModelConfig(path=str(checkpoint_folder))
    assert load_vision(cfg) is None
    with pytest.raises(UserError, match="cannot see"):
        Encoder(load_tokenizer(cfg)).prompt([Message("user", "a", (PICTURES[0],))])


def test_a_template_that_forgets_an_image_is_refused(qwen):
    with pytest.raises(UserError, match="1 places for 2 images"):
        qwen.vision.expand([2, IMAGE, 5], PICTURES[:2])


def test_an_image_that_cannot_be_read_is_named(eyes, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"no picture")
    for bad in ("absent.png", str(tmp_path / "torn.png")):
        with pytest.raises(UserError, match="png"):
            eyes.vision.pixels(bad)


def test_a_path_is_as_good_as_an_image(eyes, tmp_path):
    PICTURES[1].save(tmp_path / "x.png")
    seen, read = eyes.vision.pixels(PICTURES[1]), eyes.vision.pixels(str(tmp_path / "x.png"))
    assert all(np.array_equal(seen[k], read[k]) for k in seen)


def test_pixels_are_made_once_and_dropped_when_there_are_too_many(qwen, monkeypatch):
    picture = noise(8, 8, 9)
    first = qwen.vision.pixels(picture)
    assert qwen.vision.pixels(picture) is first
    monkeypatch.setattr("amft_fast.model.vision.CACHE_BYTES", 1)
    qwen.vision.pixels(noise(8, 8, 10))
    assert len(qwen.vision._pixels) == 1 and qwen.vision.pixels(picture) is not first


# ---------------------------------------------------------------------------------------------------------------- forward


def test_positions_are_those_of_transformers(qwen):
    sequences = qwen.demos()[:2]
    for s in sequences:
        inputs = qwen.vision.inputs([(s.ids, s.images)], CPU)
        kinds = (inputs["input_ids"] == IMAGE).int()
        theirs, _ = qwen.model.model.get_rope_index(inputs["input_ids"], kinds, inputs["image_grid_thw"])
        assert torch.equal(inputs["position_ids"], theirs)


def test_positions_by_hand():
    # text, text, an image of 2 x 3 tokens, text: it goes on behind the longer side
    got = mrope_positions(9, [2], [(1, 4, 6)], 2)
    assert got.tolist() == [[0, 1, 2, 2, 2, 2, 2, 2, 5], [0, 1, 2, 2, 2, 3, 3, 3, 5], [0, 1, 2, 3, 4, 2, 3, 4, 5]]


def test_hidden_states_are_those_of_the_model_alone(eyes):
    """Our batch of three different rows against transformers' own forward, one row at a time."""
    sequences = eyes.demos()
    ours = eyes.policy.hidden_rows(collate(sequences, [0, 1, 2], packed=False))
    alone = []
    for s in sequences:
        ids = torch.from_numpy(s.ids)[None]
        inputs = {k: v for k, v in eyes.vision.inputs([(s.ids, s.images)], CPU).items() if k != "position_ids"}
        if "image_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = (ids == IMAGE).int()
        out = eyes.model.model(**(inputs or {"input_ids": ids}), use_cache=False)
        alone.append(out.last_hidden_state[0, np.flatnonzero(s.trained) - 1])
    torch.testing.assert_close(ours, torch.cat(alone))


def test_cross_attention_masks_are_those_of_the_processor(all_eyes):
    from transformers.models.mllama.processing_mllama import MllamaProcessor

    eyes = all_eyes["mllama"]
    theirs = MllamaProcessor(eyes.vision.processor, eyes.encoder.tokenizer)
    theirs.bos_token, theirs.image_token, theirs.image_token_id = "<pad>", SEEN, eyes.vision.image_token
    texts = [f"<user> {SEEN} {SEEN} a b", f"<user> {SEEN} c"]
    made = theirs(text=["<pad> " + t for t in texts], images=[PICTURES[:2], PICTURES[2:]], padding=True)
    rows = [
        (np.asarray(i)[np.asarray(m) == 1], tuple(p))
        for i, m, p in zip(made["input_ids"], made["attention_mask"], [PICTURES[:2], PICTURES[2:]])
    ]
    ours = eyes.vision.inputs(rows, CPU)
    for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        assert np.allclose(ours[name].numpy(), np.asarray(made[name])), name
    length = len(rows[1][0])
    assert np.array_equal(ours["cross_attention_mask"][0].numpy(), np.asarray(made["cross_attention_mask"])[0])
    assert np.array_equal(
        ours["cross_attention_mask"][1, :length], np.asarray(made["cross_attention_mask"])[1, :length]
    )


def test_another_picture_gives_another_loss(eyes):
    losses = []
    for p in (noise(16, 16, 5), noise(16, 16, 6)):
        sequence = objective.demo_sequence(eyes.prompt("a", p), [8, 9], None, (p,)).with_fields(nll_weight=1.0)
        losses.append(eyes.policy(collate([sequence], [0], packed=False)).loss.item())
    assert abs(losses[0] - losses[1]) > 1e-6


def test_only_the_answers_tokens_carry_loss(eyes):
    """By gradient: hidden states of the prompt, of the image's tokens and of the verifier's words get none."""
    text = Demo(
        "x", (Message("user", "a", tuple(PICTURES[:1])),), "b", ((Message("user", "no", (PICTURES[1],)), "c d"),)
    )
    ids, response, mask, images = eyes.encoder.demo(text)
    assert images == (PICTURES[0], PICTURES[1])
    sequence = objective.demo_sequence(ids, response, mask, images).with_fields(nll_weight=1.0)
    words = eyes.encoder.tokenizer.convert_ids_to_tokens(sequence.ids[sequence.trained].tolist())
    assert words == ["b", "<eos>", "c", "d", "<eos>"]
    caught = []
    hook = eyes.model.model.register_forward_hook(lambda m, a, out: caught.append(out.last_hidden_state))
    batch = collate([sequence], [0], packed=False)
    loss = eyes.policy(batch).loss
    hook.remove()
    (gradient,) = torch.autograd.grad(loss, caught)
    touched = gradient[0].norm(dim=-1) > 0
    assert (touched.numpy() == [*sequence.trained[1:], False]).all()


def test_gradients_do_not_depend_on_the_micro_batches(eyes):
    def gradient(max_tokens: int, packed: bool = False) -> torch.Tensor:
        eyes.model.zero_grad(set_to_none=True)
        for batch in micro_batches(eyes.demos(), max_tokens, packed):
            eyes.policy(batch).loss.backward()
        return torch.cat([p.grad.flatten() for p in eyes.model.parameters() if p.grad is not None])

    whole = gradient(10_000)
    assert whole.abs().sum() > 0
    torch.testing.assert_close(gradient(1), whole)
    if eyes.vision.family == "mrope":
        torch.testing.assert_close(gradient(10_000, packed=True), whole)
    else:
        with pytest.raises(UserError, match="packing"):
            gradient(10_000, packed=True)


def test_what_is_trained_follows_the_config(folders):
    for kind, folder in folders.items():
        tower = "vision_model" if kind == "mllama" else "visual"
        names = {}
        for what in ("trained", "projector", "frozen"):
            model = load_model(ModelConfig(path=str(folder), vision=what), CPU)
            names[what] = {n for n, p in model.named_parameters() if p.requires_grad}
        everything = {n for n, _ in model.named_parameters()}
        eyes_of = {n for n in everything if f"model.{tower}" in n or "projector" in n}
        assert names["trained"] == everything and names["frozen"] == everything - eyes_of
        projector = names["projector"] - names["frozen"]
        assert projector and all("merger" in n or "projector" in n for n in projector)


# --------------------------------------------------------------------------------------------------------------- rollouts


def requests(eyes) -> list[Request]:
    shown = [("a b", PICTURES[:1]), ("a b", PICTURES[1:2]), ("c", PICTURES[:2]), ("d", []), ("a b", PICTURES[:1])]
    return [Request(tuple(eyes.prompt(t, *i)), seed, 6, tuple(i)) for seed, (t, i) in enumerate(shown)]


def by_hand(eyes, request: Request, steps: int) -> list[int]:
    """Greedy tokens from whole forwards without a cache."""
    ids = list(request.prompt_ids)
    for _ in range(steps):
        inputs = eyes.vision.inputs([(np.asarray(ids), request.images)], CPU) or {
            "input_ids": eyes.vision.readable(torch.tensor([ids]))
        }
        with torch.no_grad():
            ids.append(int(eyes.model(**inputs).logits[0, -1].argmax()))
    return ids[len(request.prompt_ids) :]


def test_generation_equals_whole_forwards_step_by_step(eyes):
    asked = requests(eyes)
    got = eyes.engine.generate(asked, Sampling(temperature=0.0))
    for r, c in zip(asked, got):
        assert c.token_ids == by_hand(eyes, r, 6)


def test_a_sample_does_not_depend_on_its_neighbours(eyes):
    together = eyes.engine.generate(requests(eyes), Sampling())
    for r, c in zip(requests(eyes), together):
        alone = eyes.engine.generate([r], Sampling())[0]
        assert alone.token_ids == c.token_ids and np.allclose(alone.logprobs, c.logprobs)


def test_the_trainer_finds_the_log_probs_that_the_engine_sampled_with(eyes):
    """Image tokens that the policy itself wrote included: a random model writes many."""
    asked = [Request(r.prompt_ids, seed, 12, r.images) for r in requests(eyes) for seed in range(6)]
    wrote = 0
    for r, c in zip(asked, eyes.engine.generate(asked, Sampling(stop_token_ids=()))):
        wrote += eyes.vision.image_token in c.token_ids[:-1]
        sequence = objective.demo_sequence(list(r.prompt_ids), c.token_ids, None, r.images)
        logprobs = eyes.policy.logprobs(collate([sequence], [0], packed=False)).logprobs
        torch.testing.assert_close(logprobs, torch.tensor(c.logprobs).double(), atol=1e-5, rtol=0)
    assert wrote or eyes.vision.family == "cross"


class Look:
    """Two turns, each of which shows a picture of its own."""

    splits, max_turns = ("train",), 2

    def start(self, item):
        return _Looking(item.data)


class _Looking:
    def __init__(self, picture):
        self.messages, self.turn = (Message("user", "a", (picture,)),), 0

    def step(self, text):
        self.turn += 1
        message = Message("user", "again", (PICTURES[2],)) if self.turn == 1 else None
        return StepResult(message, 0.5, self.turn == 2, {"success": self.turn == 2})


def test_a_verifier_may_show_pictures_too(qwen):
    eyes = qwen  # in an mllama, text before the first image attends to later ones: see Vision.kin
    items = [Item("x", PICTURES[0]), Item("y", PICTURES[1])]
    sampling = Sampling(stop_token_ids=eyes.encoder.stop_token_ids)
    samples = run(
        eyes.engine, Look(), items, eyes.encoder, sampling, num_generations=3, max_new_tokens=5, seed_parts=(1,)
    )
    for i, s in enumerate(samples):
        assert s.images == (items[i // 3].data, PICTURES[2]) and len(s.turns) == 2
        sequence = objective.rollout_sequence(s, 1.0)
        logprobs = eyes.policy.logprobs(collate([sequence], [0], packed=False)).logprobs
        behavior = torch.tensor(s.behavior_logprobs)[torch.tensor(s.loss_mask) == 1].double()
        torch.testing.assert_close(logprobs, behavior, atol=1e-5, rtol=0)


def test_cached_rollouts_keep_their_pictures_through_a_checkpoint(qwen):
    import json

    items = [Item("x", PICTURES[0]), Item("y", PICTURES[1])]
    sampling = Sampling(stop_token_ids=qwen.encoder.stop_token_ids)
    samples = run(
        qwen.engine, Look(), items, qwen.encoder, sampling, num_generations=2, max_new_tokens=4, seed_parts=(1,)
    )
    cache, back = RolloutCache(items, 0.5), RolloutCache(items, 0.5)
    cache.groups = [RolloutGroup(0, 3, samples[:2]), RolloutGroup(1, 3, samples[2:])]
    state = json.loads(json.dumps(cache.state_dict()))
    assert len(state[0]["images"]) == 2  # each once, whoever shares it
    back.load_state_dict(state)
    for old, new in zip(samples, [s for g in back.groups for s in g.samples]):
        assert [x.tobytes() for x in new.images] == [x.tobytes() for x in old.images]
        assert new.response_ids == old.response_ids and new.turns == old.turns


def test_vllm_is_given_one_place_for_each_image(qwen):
    """It makes their runs of tokens itself."""
    from amft_fast.rollout.vllm.groups import group_requests, single_places

    ids = qwen.prompt("a b", *PICTURES[:2])
    (group,) = group_requests([Request(tuple(ids), 1, 4, tuple(PICTURES[:2]))])
    short = single_places(group, IMAGE)
    assert short.count(IMAGE) == 2 and qwen.vision.expand(short, PICTURES[:2]) == ids
    (plain,) = group_requests([Request((5, 6), 1, 4)])
    assert single_places(plain, IMAGE) == [5, 6]


def test_a_picture_travels_to_a_server_without_loss(tmp_path):
    from amft_fast.rollout.vllm.groups import as_url

    picture = noise(24, 16)
    picture.save(tmp_path / "it.png")
    for given in (picture, tmp_path / "it.png"):
        head, _, data = as_url(given).partition(",")
        assert head == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).tobytes() == picture.tobytes()


def test_an_image_of_several_rows_goes_through_the_tower_once(qwen):
    seen = []
    hook = qwen.model.model.visual.register_forward_pre_hook(
        lambda m, args, kw: seen.append(args[0].shape[0]), with_kwargs=True
    )
    sequences = [
        objective.demo_sequence(qwen.prompt("a", PICTURES[0]), [8 + i], None, (PICTURES[0],)).with_fields(
            nll_weight=1.0
        )
        for i in range(4)
    ]
    together = qwen.policy(collate(sequences, [0, 1, 2, 3], packed=False)).logprobs
    qwen.engine.generate([Request(tuple(sequences[0].ids[:-1]), 1, 2, (PICTURES[0],))] * 3, Sampling())
    hook.remove()
    assert seen == [8, 8]  # patches of one image
    alone = [qwen.policy(collate(sequences, [i], packed=False)).logprobs for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone))
