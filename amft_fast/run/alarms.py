"""What goes wrong without an error: rewards that teach nothing, answers that nobody can read, an entropy that runs away.

Each alarm is raised once in a run, when its sign has stood for `STEPS` steps with rollouts in a row, and says what helps.
"""

from __future__ import annotations

from typing import Any

from amft_fast.config import Config

STEPS = 5
MOST = 0.5  # share of a step's answers
# Entropy against H* (or against the first step's, where no H* is measured). Runs that learn settle at half of it and less; a
# bonus that alone drives the policy shows by half more.
LOW, HIGH = 0.25, 1.5
GROUP_RELATIVE = ("grpo", "dr_grpo", "rloo")


class Alarms:
    """Watches the records of a run's steps."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.said: list[str] = []
        self.in_row: dict[str, int] = {}
        self.first_entropy: float | None = None

    def look(self, record: dict[str, Any]) -> dict[str, str]:
        """The alarms that this step raises: name to sentence. Steps without rollouts are passed over."""
        if "reward" not in record or record["phase"] == "warmup":
            return {}
        if self.first_entropy is None:
            self.first_entropy = record.get("entropy")
        signs = self._signs(record)
        self.in_row = {name: self.in_row.get(name, 0) + 1 for name in signs}
        new = {name: text for name, text in signs.items() if self.in_row[name] == STEPS and name not in self.said}
        self.said += new
        return new

    def _signs(self, record: dict[str, Any]) -> dict[str, str]:
        """The sentences of what is wrong at this step."""
        found = {}
        if record["reward_spread"] == 0:
            found["equal_rewards"] = self._equal(record)
        elif record["groups_without_spread"] == 1 and self.cfg.advantage.kind in GROUP_RELATIVE:
            found["no_spread"] = (
                f"for {STEPS} steps all answers to a prompt have earned the same, so advantage.kind {self.cfg.advantage.kind} "
                "learns nothing from them: draw more answers a prompt (rollout.num_generations), turn on "
                "rollout.dynamic_sampling, or take problems that succeed now and then"
            )
        if record["truncated"] > MOST:
            found["truncated"] = (
                f"for {STEPS} steps most answers ({record['truncated']:.0%} now) have run into the bound on their length: "
                f"raise rollout.max_new_tokens (now {self.cfg.rollout.max_new_tokens}), and see in samples.jsonl whether they "
                "end at all"
            )
        if record.get("no_answer", 0.0) > MOST:
            found["no_answer"] = (
                f"for {STEPS} steps most answers ({record['no_answer']:.0%} now) have held nothing that the task can read: see "
                "samples.jsonl; warm up longer on demonstrations (train.warmup_steps), or ask for the format in the prompt"
            )
        return found | self._entropy(record)

    def _equal(self, record: dict[str, Any]) -> str:
        if record["success"] == 1:
            return f"for {STEPS} steps every answer has been right: take harder problems, or end here"
        return (
            f"for {STEPS} steps every answer has earned the same reward ({record['reward']:g}), so nothing is learned from "
            "rewards: see samples.jsonl whether right answers are judged so; warm up longer on demonstrations "
            "(train.warmup_steps), or take easier problems"
        )

    def _entropy(self, record: dict[str, Any]) -> dict[str, str]:
        now, target = record.get("entropy"), record.get("entropy_target")
        name, normal = ("H*", target) if target else ("that of the first step", self.first_entropy)
        if now is None or not normal:
            return {}
        if now < LOW * normal:
            return {
                "entropy_low": f"the policy's entropy has been under a quarter of {name} for {STEPS} steps ({now:.3g} against "
                f"{normal:.3g} nats), so its answers hardly differ: lower train.lr, raise objective.clip_high, or hold it up "
                "with objective.entropy_coef"
            }
        if now > HIGH * normal:
            coef = self.cfg.objective.entropy_coef
            cure = f"lower objective.entropy_coef (now {coef:g})" if coef else "lower train.lr"
            return {
                "entropy_high": f"the policy's entropy has been more than half above {name} for {STEPS} steps ({now:.3g} "
                f"against {normal:.3g} nats), so it forgets what it knew: {cure}, and see whether any answer succeeds"
            }
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"said": self.said, "in_row": self.in_row, "first_entropy": self.first_entropy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.said, self.in_row, self.first_entropy = list(state["said"]), dict(state["in_row"]), state["first_entropy"]
