"""bench designs: what it records, and the controller's own code on courses that are known."""

import json

import numpy as np
import pytest
from fakes import SHORT_RUN

from amft_fast.controller import blocks
from bench import designs

PLACES = np.linspace(0, 1, 9)


def regime(imitating, exploring, falls, tmp_path, prompts=64, demos=64, luck=0.4):
    """`imitating(s)`, and from there `exploring(s, e)`: mean rewards; `falls(s)`: the loss of each demonstration."""
    rng = np.random.default_rng(0)
    spread = rng.normal(0, 0.1, prompts)
    hard = 0.5 + rng.random(demos)

    def look(at, mean, s):
        rewards = np.clip(mean + spread, 0, 1).tolist()
        return {"at": float(at), "rewards": rewards, "luck": luck, "nll": (hard * falls(s)).tolist()}

    shares = (0.0, 0.25, 0.5)
    ways = {f"{s:g}": [look(e, exploring(s, e), s) for e in PLACES[1:] if s + e <= 1] for s in shares}
    (tmp_path / "c.toml").write_text(SHORT_RUN)
    return {
        "name": "made up",
        "config": str(tmp_path / "c.toml"),
        "flags": ["--train.steps", "200", "--controller.look_prompts", "48", "--train.warmup_steps", "0"],
        "look": {"prompt": 1e-4, "demo": 1e-5},
        "imitated": [look(s, imitating(s), s) for s in PLACES],
        "explored": ways,
    }


def test_courses_are_read_between_the_places_that_were_looked_at(tmp_path):
    world = designs.World(
        regime(lambda s: 0.2 + 0.4 * s, lambda s, e: 0.2 + 0.4 * s + 0.3 * e, lambda s: 2 - s, tmp_path)
    )
    for s, e in ((0, 0), (0.3, 0), (1, 0), (0, 0.6), (0.25, 0.33), (0.4, 0.5)):
        assert world.success(s, e) == pytest.approx(0.2 + 0.4 * s + 0.3 * e, abs=0.02)
        assert world.losses(s, e).mean() / world.losses(0, 0).mean() == pytest.approx((2 - s) / 2, abs=0.01)
        p = world.prompts(s, e, world.hardness)
        assert p.mean() == pytest.approx(world.success(s, e), abs=1e-6)
        assert (p * (1 - p)).mean() / (p.mean() * (1 - p.mean())) == pytest.approx(0.4, abs=0.01), "its luck"
    assert world.best() == (pytest.approx(0.6, abs=0.01), 1)


def test_the_product_s_rules_go_on_imitating_or_take_it_back(tmp_path):
    """Where imitation shows all along it goes on to the end, or as far as luck lets it; where it only costs, exploring has the
    run but for a block."""
    pays = designs.World(
        regime(lambda s: 0.2 + 0.6 * s, lambda s, e: 0.2 + 0.6 * s, lambda s: 2 * np.exp(-3 * s), tmp_path)
    )
    harms = designs.World(
        regime(lambda s: 0.4 - 0.4 * s, lambda s, e: 0.4 - 0.4 * s + 0.3 * e, lambda s: 2.0, tmp_path)
    )
    lucky = designs.World(
        regime(lambda s: 0.2 + 0.6 * s, lambda s, e: 0.2 + 0.6 * s, lambda s: 2 * np.exp(-3 * s), tmp_path, luck=0.9)
    )
    went_on, back = ([designs.Design(world, {}).play(seed) for seed in range(9)] for world in (pays, harms))
    assert 0.15 < np.median([designs.Design(lucky, {}).play(seed).imitated for seed in range(9)]) < 0.3
    assert np.median([p.imitated for p in went_on]) > 0.85 and np.median([p.success for p in went_on]) > 0.7
    assert np.median([p.imitated for p in back]) == 0 and np.median([p.explored for p in back]) > 0.85
    assert np.median([p.success for p in back]) > 0.65, "looks, and a block, are what it lost"
    assert all(p.imitated + p.explored + p.looks <= 1.01 for p in went_on + back)


def test_a_design_changes_settings_and_constants_for_its_own_runs_alone(tmp_path, capsys):
    world = regime(lambda s: 0.3, lambda s, e: 0.3 + 0.2 * e, lambda s: 2 - 0.1 * s, tmp_path)
    margin = blocks.MARGIN
    no_margin = designs.Design(designs.World(world), {"MARGIN": 0.0, "controller.imitation_share": 0.2})
    as_it_is = designs.Design(designs.World(world), {})
    assert no_margin.cfg.controller.imitation_share == 0.2
    assert np.median([no_margin.play(seed).imitated for seed in range(9)]) > 0, "a loss that creeps is enough"
    assert margin == blocks.MARGIN and np.median([as_it_is.play(seed).imitated for seed in range(9)]) == 0
    (tmp_path / "w.json").write_text(json.dumps(world))
    assert (
        designs.main(
            [str(tmp_path / "w.json"), "--seeds", "2", "--set", "MARGIN=0", "--set", "controller.confidence=1"]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "as it is" in out and "MARGIN 0.0, controller.confidence 1" in out and "by lot" not in out
    with pytest.raises(SystemExit):
        designs.main([str(tmp_path / "w.json"), "--set", "margin=0"])
    assert (
        "takes controller.setting=value or one of MARGIN, LATER_ASKED, LONGEST, MOST=value" in capsys.readouterr().err
    )


def test_a_regime_is_recorded_along_all_its_ways(tmp_path, checkpoint_folder):
    (tmp_path / "c.toml").write_text(SHORT_RUN)
    out = tmp_path / "r.json"
    settings = {
        "model.path": checkpoint_folder,
        "run.dir": tmp_path / "run",
        "controller.look_prompts": 4,
        "meta.num_generations": 2,
    }
    flags = [x for k, v in settings.items() for x in ("--set", f"{k}={v}")]
    record = ["--record", str(tmp_path / "c.toml"), "--budget", "4000", "--shares", "0,0.3", "--places", "2"]
    assert designs.main([*record, "--out", str(out), *flags]) == 0
    found = json.loads(out.read_text())
    assert [p["at"] for p in found["imitated"]] == [0, 0.25, 1], "more places early"
    ways = {float(share): [p["at"] for p in way] for share, way in found["explored"].items()}
    assert ways == {0: [0.25, 1], 0.25: [0.25, 0.75]}, "from the places nearest to the shares, to the end of the budget"
    assert len(found["imitated"][0]["rewards"]) == 4 and found["look"]["prompt"] > 0
    losses = [np.mean(p["nll"]) for p in found["imitated"]]
    assert losses[0] > losses[1], "it imitates"
    assert 0 <= designs.World(found).success(0.2, 0.3) <= 1
