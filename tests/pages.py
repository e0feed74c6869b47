"""Made-up run folders for the report, and what its page consists of."""

from __future__ import annotations

import json
from html.parser import HTMLParser

from amft_fast.config import Config
from amft_fast.config_file import to_toml

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """What a page consists of; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.text, self.urls, self.ids, self.handlers = [], [], [], [], []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.urls += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        self.ids += [v for k, v in attrs if k == "id"]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def result(sampled: float, prompts: int = 100, k: int = 8) -> dict:
    pass_at_k = min(1.0, 2 * sampled)
    return {"prompts": prompts, "k": k, "greedy": sampled, "sampled": sampled, "pass_at_k": pass_at_k, "stderr": 0.01}


def rl_step(step: int) -> dict:
    return {
        "step": step,
        "phase": "train",
        "mu": 0.5,
        "lr": 3e-4,
        "loss": 1.0 / (step + 1),
        "sft_loss": 2.0 / (step + 1),
        "pg_loss": 0.01 * (-1) ** step,
        "entropy": 1.5 - 0.001 * step,
        "entropy_target": 1.6,
        "clip_fraction": 0.0,
        "grad_norm": 1.0 + step % 3,
        "reward": 0.1 + 0.001 * step,
        "success": 0.1 + 0.001 * step,
        "response_length": 8.0,
        "tokens": 1000,
        "seconds": 1.0,
        "time/rollout": 0.6,
        "time/update": 0.3,
    }


def lines(rows: list) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def run_writer(tmp_path):
    """A function that writes a run folder: keyword arguments replace the files of a small finished run."""

    def write(steps=4, warmup=1, config=None, **files):
        cfg = Config.model_validate(
            config or {"train": {"method": "fixed", "steps": steps - warmup, "warmup_steps": warmup}}
        )
        metrics = [rl_step(i) | ({"phase": "warmup", "mu": 1.0} if i < warmup else {}) for i in range(steps)]
        start, end = {"val": result(0.1), "test": result(0.2)}, {"val": result(0.3), "test": result(0.4)}
        evals = [
            {"step": -1, "at": 0, "tokens": 0, "wall_s": 1.0, "full": True, **start},
            {"step": 1, "at": 2, "tokens": 2000, "wall_s": 4.0, "full": False, "val": result(0.2, 10, 4)},
            {"step": steps - 1, "at": steps, "tokens": 4000, "wall_s": 9.0, "full": True, **end},
        ]
        sample = {"step": 1, "prompt": "3 5 8", "completion": "3 * 8", "reward": 1.0, "success": True}
        summary = {"method": "fixed", "task": "general_points", "steps": steps, "wall_s": 12.0, "tokens": 4000}
        contents = {
            "config.toml": to_toml(cfg),
            "environment.json": json.dumps({"torch": "2.13.0", "device": "A CPU", "threads": "2"}),
            "metrics.jsonl": lines(metrics),
            "evals.jsonl": lines(evals),
            "samples.jsonl": lines([sample, sample | {"step": 3, "success": False, "reward": 0.0}]),
            "summary.json": json.dumps(summary | {"start": start, "end": end}),
        }
        run = tmp_path / "run"
        run.mkdir()
        for name, text in (contents | files).items():
            if text is not None:
                (run / name).write_text(text, errors="surrogatepass")
        return run

    return write
