"""Mathematical reasoning: problems with a gold answer, demonstrations, and a reward for the right final answer.

Data come from files or the hub (sources.py) in the layouts of layouts.py, rewards from reward.py. Splits are `train`, `val` and
`test`, told apart by a hash of the problem's text, and one for each benchmark of configs/benchmarks.toml that is asked for.
Training problems that stand in a benchmark, or share 13 words in a row with one of its problems, are left out. Rows without a
gold answer are demonstrations alone: `prompts` does not show them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from amft_fast.config import MathConfig
from amft_fast.interfaces import Demo, Item, Message, StepResult
from amft_fast.tasks.math.answer import extract
from amft_fast.tasks.math.benchmarks import Benchmark, chosen, load_benchmark
from amft_fast.tasks.math.data import CountTokens, Limits, Problem, Store, Tally, View, load
from amft_fast.tasks.math.dry_run import dry_run
from amft_fast.tasks.math.reward import choice_reward, format_reward, reward, rewards
from amft_fast.tasks.math.sameness import Fingerprints
from amft_fast.tasks.math.sources import Source
from amft_fast.tasks.math.thinking import opened_thought, without_opening

__all__ = ["SYSTEM_PROMPT", "MathEpisode", "MathTask", "choice_reward", "format_reward", "reward", "rewards"]

SYSTEM_PROMPT = (
    "Solve the problem. Reason step by step and check your work. Write the final answer once, at the end, inside \\boxed{}; "
    "if the problem offers choices, write only the letter of the right one there."
)
SLACK = 8  # tokens that a text may take more between others than alone, and the end of an answer
THINKING_PROMPT = (
    "First think the problem through, trying ideas and checking them, between <think> and </think>. Then write down the "
    "solution. Write the final answer once, at its end, inside \\boxed{}; if the problem offers choices, write only the letter "
    "of the right one there."
)


class MathTask:
    """The task: `amft_fast.interfaces.Task` over problems with a gold answer. One turn.

    Its settings are those of the section `task.math` (see `config.MathConfig`). Tokens are those of the encoder that
    `prepare` is given, without one thirds of characters.

    Raises ValueError naming an argument that is out of range. Data are read by `prepare`, or at the first look at a split;
    then UserError is raised for what cannot be read or used.
    """

    max_turns = 1

    def __init__(self, settings: MathConfig) -> None:
        self.settings = s = settings
        if not s.train:
            raise ValueError("train must name at least one file or dataset")
        self.prompting = Prompting(s.system_prompt, s.keep_system, s.thinking)
        self._benchmarks = chosen(s.benchmarks_file, s.benchmarks)
        self._others = chosen(s.benchmarks_file, s.decontaminate)
        self.splits = ("train", "val", "test", *(b.name for b in self._benchmarks))
        self._stores: dict[str, Store] = {}
        self.tallies: list[Tally] = []

    dry_run = staticmethod(dry_run)

    def prepare(self, encoder: Any = None, max_new_tokens: int = 0) -> list[str]:
        """Reads the data; returns what became of its rows, as lines of text.

        `encoder` (rollout.encoder.Encoder) counts tokens and knows the model's context, into which a prompt, an answer of
        `max_new_tokens` and a demonstration must fit; without one nothing bounds them but the settings.
        """
        s = self.settings
        limits = Limits(s.max_prompt_tokens, s.max_demo_tokens)
        if encoder is not None:
            self.prompting.opened = opened_thought(encoder.tokenizer)
            scaffold = len(encoder.prompt(self.prompting.messages(Problem(id="", problem="", answer=None)))) + SLACK
            count = _counter(encoder.tokenizer)
            limits = replace(limits, count=count, context=encoder.context, scaffold=scaffold, answer=max_new_tokens)
        stores = {split: Store() for split in self.splits}
        self.tallies, fingerprints = [], Fingerprints()
        for benchmark in self._benchmarks:
            self.tallies.append(load_benchmark(benchmark, stores[benchmark.name]))
            _add_all(fingerprints, stores[benchmark.name], benchmark.name)
        for other in self._others:
            store = Store()
            self.tallies.append(load_benchmark(other, store, needed="nothing"))
            _add_all(fingerprints, store, other.name)
        self.tallies.append(
            load(
                "training data",
                [Source(text) for text in s.train],
                lambda key: stores[self.assign_split(key)],
                columns=s.columns,
                limits=limits,
                forbidden=fingerprints,
                drop_forbidden=s.drop_overlap,
                max_problems=s.max_train,
            )
        )
        self._stores = stores
        return [line for tally in self.tallies for line in tally.lines()]

    def assign_split(self, key: str) -> str:
        """The split of a problem, by its key (`sameness.problem_key`) alone: it never moves."""
        at, (val, test) = int(key, 16) / 2**64, (self.settings.val_share, self.settings.test_share)
        return "val" if at < val else "test" if at < val + test else "train"

    def prompts(self, split: str) -> Sequence[Item]:
        """The problems of a split that have a gold answer."""
        store = self._store(split)
        return View(store, store.with_answer, _item)

    def demos(self, split: str) -> Sequence[Demo]:
        """The problems of a split that have a demonstration."""
        store = self._store(split)
        return View(store, store.with_demo, self._demo)

    def demo(self, item: Item) -> Demo | None:
        """The demonstration of a problem, where it has one."""
        return self._demo(item.data) if item.data.response is not None else None

    def _store(self, split: str) -> Store:
        if split not in self.splits:
            raise ValueError(f"split must be one of {', '.join(self.splits)}, got {split!r}")
        if not self._stores:
            self.prepare()
        return self._stores[split]

    def _demo(self, problem: Problem) -> Demo:
        response = without_opening(problem.response, self.prompting.opened)
        return Demo(problem.id, self.prompting.messages(problem), response)

    def gold(self, item: Item) -> str:
        """The gold answer."""
        return item.data.answer

    def start(self, item: Item) -> MathEpisode:
        return MathEpisode(item.data, self.prompting, self.settings.format_weight)

    def step_all(self, episodes: Sequence[MathEpisode], texts: Sequence[str]) -> list[StepResult]:
        """`step` of many episodes at once, compared on all cores."""
        return judge(episodes, texts)


class Prompting:
    """How a problem becomes a prompt."""

    def __init__(self, system_prompt: str | None = None, keep_system: bool = False, thinking: bool = False) -> None:
        ours = THINKING_PROMPT if thinking else SYSTEM_PROMPT
        self.system = ours if system_prompt is None else system_prompt
        self.keep_system, self.thinking = keep_system, thinking
        self.opened = ""
        """The `<think>` that the chat template ends a prompt with, where it does."""

    def messages(self, problem: Problem) -> tuple[Message, ...]:
        system = problem.system if self.keep_system and problem.system else self.system
        first = (Message("system", system),) if system else ()
        return (*first, *(Message(role, text) for role, text in problem.history), Message("user", problem.problem))


class MathEpisode:
    """One answer to one problem."""

    def __init__(self, problem: Problem, prompting: Prompting, format_weight: float = 0.0) -> None:
        self.problem, self.prompting, self.format_weight = problem, prompting, format_weight
        self.messages = prompting.messages(problem)

    def step(self, text: str) -> StepResult:
        return judge([self], [text])[0]

    def result(self, text: str, right: bool) -> StepResult:
        form = format_reward(text, self.prompting.thinking, bool(self.prompting.opened))
        answer = extract(text)
        info: dict[str, Any] = {
            "success": right,
            "format": form,
            "answered": float(answer is not None),
            "answer": answer,
        }
        return StepResult(None, float(right) + self.format_weight * form, True, info)


def judge(episodes: Sequence[MathEpisode], texts: Sequence[str]) -> list[StepResult]:
    """The results of answers to many problems: choices by their letter, all else by `rewards` in one go."""
    right = [e.problem.choices and choice_reward(t, e.problem.answer) == 1.0 for e, t in zip(episodes, texts)]
    open_ = [i for i, e in enumerate(episodes) if not e.problem.choices]
    for i, value in zip(open_, rewards([texts[i] for i in open_], [episodes[i].problem.answer for i in open_])):
        right[i] = value == 1.0
    return [e.result(t, r) for e, t, r in zip(episodes, texts, right, strict=True)]


def _counter(tokenizer: Any) -> CountTokens:
    return lambda texts: [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def _item(problem: Problem) -> Item:
    return Item(problem.id, problem)


def _add_all(fingerprints: Fingerprints, store: Store, name: str) -> None:
    for problem in store:
        fingerprints.add("\n\n".join([*(text for _, text in problem.history), problem.problem]), name)


class BenchmarkTask:
    """A benchmark alone, as a task with the one split `test`: what `amft-fast eval MODEL --benchmarks` runs."""

    splits = ("test",)
    max_turns = 1

    def __init__(self, benchmark: Benchmark, prompting: Prompting, limit: int | None = None) -> None:
        self.store = Store()
        self.tally = load_benchmark(benchmark, self.store, limit)
        self.prompting = prompting

    def prompts(self, split: str) -> Sequence[Item]:
        return View(self.store, range(len(self.store)), _item)

    def demos(self, split: str) -> Sequence[Demo]:
        return ()

    def start(self, item: Item) -> MathEpisode:
        return MathEpisode(item.data, self.prompting)

    step_all = MathTask.step_all
