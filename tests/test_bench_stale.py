"""bench stale: what it trains and writes."""

import json

from fakes import SHORT_RUN

from bench import stale


def test_each_depth_is_trained_with_rollouts_of_that_age(tmp_path, checkpoint_folder):
    (tmp_path / "c.toml").write_text(SHORT_RUN)
    out = tmp_path / "stale.json"
    flags = ["--model.path", str(checkpoint_folder), "--train.method", "rl", "--run.dir", str(tmp_path / "run")]
    assert stale.main([str(tmp_path / "c.toml"), "--depths", "0,2", "--budget", "9000", "--out", str(out), *flags]) == 0
    on_policy, ahead = json.loads(out.read_text())["rows"]
    assert (on_policy["depth"], on_policy["age"], ahead["depth"]) == (0, 0, 2) and 0 < ahead["age"] <= 2
    assert min(on_policy["tokens"], ahead["tokens"]) >= 9000
