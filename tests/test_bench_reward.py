"""The benchmark of the maths reward: what it reads, what it counts, its bombs, its peers as single files."""

import json

from bench import reward, reward_peers


def rows(tmp_path, cases):
    path = tmp_path / "cases.jsonl"
    path.write_text(
        "".join(json.dumps(dict(zip(("kind", "gold", "response", "right"), case))) + "\n" for case in cases)
    )
    return path


def test_wrong_ones_are_counted(tmp_path, monkeypatch, capsys):
    path = rows(tmp_path, [("a", "5", "\\boxed{5}", 1), ("a", "5", "\\boxed{6}", 0), ("b", "x", "\\boxed{y}", 0)])
    monkeypatch.setattr(
        reward, "peers", lambda: ({"yes to all": lambda response, gold: True}, {"absent": "not installed"})
    )
    monkeypatch.setattr(reward, "bombs", lambda: [("\\boxed{(10^9)!}", "x+1")])
    out = tmp_path / "out.json"
    assert reward.main(["--cases", str(path), "--files", str(tmp_path / "none"), "--out", str(out)]) == 0
    found = json.loads(out.read_text())["cases"]
    assert (found["ours"]["wrong_yes"], found["ours"]["wrong_no"]) == (0, 0)
    assert (found["yes to all"]["wrong_yes"], found["yes to all"]["wrong_no"]) == (2, 0)
    said = capsys.readouterr().out
    assert "cases: 3 rows, 1 of them right" in said and "absent is not here: not installed" in said
    monkeypatch.setattr(reward, "ours", lambda rows: [True] * len(rows))
    assert reward.main(["--cases", str(path), "--files", str(tmp_path / "none"), "--out", str(out)]) == 1


def test_mistakes_are_one_sentence(tmp_path, capsys):
    assert reward.main(["--cases", str(tmp_path / "a"), "--files", str(tmp_path / "b")]) == 2
    assert "name cases with --cases" in capsys.readouterr().err
    (tmp_path / "cases.jsonl").write_text('{"gold": "5"}\n')
    assert reward.main(["--cases", str(tmp_path / "cases.jsonl"), "--files", str(tmp_path / "b")]) == 2
    assert "cases.jsonl:1 is no JSON object with kind, gold, response and right" in capsys.readouterr().err


def test_golds_are_crossed():
    made = reward.crossed("f", ["1", "2", "x=5", "5", "2.0"], 10)
    assert [row.right for row in made].count(True) == 5
    wrong = {(row.response[len("Hence it is $\\boxed{") : -len("}$.")], row.gold) for row in made if not row.right}
    assert wrong and all({a, b} not in ({"2", "2.0"}, {"x=5", "5"}) and a != b for a, b in wrong)


def test_the_bombs_are_a_thousand_different_ones():
    assert len(set(reward.bombs())) == 1000


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(reward_peers, "_PEERS", {"absent": lambda: reward_peers._file("nothing-of-this-name", "a.py")})
    found, missing = reward_peers.peers()
    assert not found and "absent" in missing


def test_a_peer_that_raises_says_no():
    assert reward_peers._guarded(lambda response, gold: 1 / 0)("a", "b") is False
