"""The tasks' sections."""

from __future__ import annotations

import difflib
from importlib.metadata import entry_points
from typing import Any, Literal

from pydantic import Field, model_validator

from amft_fast.config.kinds import File, Seconds, Section, Seed, Tokens, check_shares

MAX_TARGET = 1000  # of General Points


class GeneralPointsConfig(Section):
    """General Points (the 24 game), see tasks/general_points/."""

    num_cards: int = Field(4, ge=2, le=6)
    """Cards per hand."""
    target: int = Field(24, ge=0, le=MAX_TARGET)
    """The number to make; used when `targets` is not given."""
    targets: tuple[int, int] | None = None
    """Lowest and highest target, each problem carrying its own in the prompt; overrides `target`."""
    images: bool = False
    """Show the hand as a picture (GP-VL, see tasks/general_points/vision.py): a vision-language policy is needed."""
    card_size: tuple[int, int] = (112, 160)
    """Width and height of a card in pixels, with images."""
    card_margin: int = Field(12, ge=0, le=1024)
    """Pixels of table around each card, with images."""
    answer_format: Literal["json", "formula"] = "json"
    """json: fields cards, number, formula and a prompt in sentences; formula: bare words, for tiny models."""
    reward_scale: Literal["published", "binary", "shaped"] = "binary"
    """published: 5, 1, -1, -2, -3; shaped: the same divided by 5; binary: 1 for a correct formula, else 0."""
    max_turns: int = Field(5, ge=1, le=100)
    """Tries per hand; after a wrong one the verifier's message goes back to the policy."""
    demo_share: float = Field(1.0, ge=0, le=1)
    """Share of the training hands that have a demonstration from the solver."""
    val_share: float = Field(0.1, ge=0, lt=1)
    """Share of the value multisets held out for validation."""
    test_share: float = Field(0.2, ge=0, lt=1)
    """Share of the value multisets held out for the test."""
    ood_share: float = Field(0.5, ge=0, le=1)
    """Share of the multisets with an 11, 12 or 13 that the split ood holds; no split shows the rest."""
    max_train: int | None = Field(None, ge=1)
    """Upper bound on the training problems; default: all."""
    max_val: int | None = Field(None, ge=1)
    """Upper bound on the validation problems."""
    max_test: int | None = Field(None, ge=1)
    """Upper bound on the test problems."""
    max_ood: int | None = Field(None, ge=1)
    """Upper bound on the problems of the other rule."""
    seed: Seed = 0
    """Seed of splits, order of cards and demonstrations: the data's, apart from run.seed. A base checkpoint is clean of the
    test hands of one such seed only."""

    @model_validator(mode="after")
    def _check(self) -> GeneralPointsConfig:
        if self.targets is not None and not 0 <= self.targets[0] <= self.targets[1] <= MAX_TARGET:
            raise ValueError(
                f"targets must be two numbers low <= high from 0 to {MAX_TARGET}, got {list(self.targets)}"
            )
        if not (8 <= self.card_size[0] <= 4096 and 16 <= self.card_size[1] <= 4096):
            raise ValueError(
                f"card_size must be width and height, at least 8 x 16 pixels and at most 4096, got {list(self.card_size)}"
            )
        check_shares(self, "hands for training")
        return self


class VirlConfig(Section):
    """V-IRL (navigation by instruction), see tasks/virl/."""

    data: File = ""
    """Folder of routes in the published layout (see tasks/virl/data.py); default: generated cities."""
    ood_data: File = ""
    """Another such folder, of another city, for the split visual_ood."""
    views: bool = False
    """Show pictures in place of the landmarks' words: a vision-language policy is needed."""
    view_size: int = Field(112, ge=16, le=2048)
    """Side of one of the four views of a picture, in pixels."""
    answer_format: Literal["json", "compact"] = "json"
    """json: fields current observation, current instruction, action; compact: bare words, for tiny models."""
    reward_scale: Literal["published", "shaped", "binary"] = "published"
    """published: 1, -1, -1.5, -1.75 a turn; shaped: the same divided by the route's points; binary: 1 at the end of a walk
    without a point passed over."""
    verify_turns: int = Field(2, ge=1, le=10)
    """Answers judged at one point before it is passed over."""
    legs: tuple[int, int] = (3, 5)
    """Fewest and most legs of a generated route."""
    cities: int = Field(4, ge=1, le=1000)
    """Cities generated, and as many others for visual_ood."""
    spacing: float = Field(35.0, gt=0, le=1e6)
    """Metres between the points of a generated route."""
    leg_points: int = Field(2, ge=0, le=1000)
    """Points between the ends of a leg of a published route."""
    seed: Seed = 0
    """Seed of cities, routes and splits: the data's, apart from run.seed."""
    num_train: int = Field(1000, ge=1, le=10**7)
    """Generated training routes."""
    num_val: int = Field(128, ge=1, le=10**7)
    """Generated validation routes."""
    num_test: int = Field(200, ge=1, le=10**7)
    """Generated test routes; ood and visual_ood have as many."""
    val_share: float = Field(0.1, gt=0, lt=1)
    """Share of the published routes held out for validation."""
    test_share: float = Field(0.2, gt=0, lt=1)
    """Share of the published routes held out for the test."""
    demo_share: float = Field(1.0, ge=0, le=1)
    """Share of the training routes that have a demonstration."""

    @model_validator(mode="after")
    def _check(self) -> VirlConfig:
        if not 1 <= self.legs[0] <= self.legs[1] <= 20:
            raise ValueError(f"legs must be the fewest and the most, from 1 to 20, got {list(self.legs)}")
        if self.ood_data and not self.data:
            raise ValueError("ood_data needs data: both sources are files, or neither is")
        check_shares(self, "routes to train on")
        return self


class MathConfig(Section):
    """Mathematical reasoning, see tasks/math/ and docs/math.md."""

    train: list[File] = []
    """Training data: files (.jsonl, .json, .csv, .parquet, packed or not), globs of them, or datasets of the Hugging Face hub
    (name, name:config, name@split).
    Relative files are looked up from the working directory, then from the config file's folder."""
    columns: dict[str, str] = {}
    """Column map (problem, answer, response, system) for a layout that is not known; dots for what is nested."""
    benchmarks: list[File] = []
    """Benchmarks by their name in `benchmarks_file`, or name=file or dataset: each becomes a split, and its problems are kept
    out of training."""
    benchmarks_file: File = "benchmarks.toml"
    """Where benchmarks are described; looked up as files of `train` are."""
    decontaminate: list[File] = []
    """Further benchmarks, files or datasets whose problems are kept out of training."""
    drop_overlap: bool = True
    """Keep the problems of `benchmarks` and `decontaminate` out of training; false: only count what they have in common."""
    system_prompt: str | None = None
    """System prompt; default: ours, empty: none."""
    keep_system: bool = False
    """Take the system prompt that comes with a problem, where one does."""
    thinking: bool = False
    """Ask for <think> ... </think> before the solution; the format reward then looks for it."""
    format_weight: float = Field(0.0, ge=0)
    """Weight of the format reward, on top of 1 for a right answer."""
    val_share: float = Field(0.02, ge=0, lt=1)
    """Share of the problems held out for validation, by a hash of their text."""
    test_share: float = Field(0.0, ge=0, lt=1)
    """Share of the problems held out for the split test."""
    max_train: int | None = Field(None, ge=1)
    """Problems read at most; default: all."""
    max_prompt_tokens: Tokens = 1024
    """Longer problems are left out."""
    max_demo_tokens: Tokens = 8192
    """Longer demonstrations are left out, their problems kept."""

    @model_validator(mode="after")
    def _check(self) -> MathConfig:
        check_shares(self, "problems for training")
        return self


class DataConfig(Section):
    """Rows of one's own, judged by rewards of one's own; see tasks/data/ and docs/rewards.md."""

    train: list[File] = []
    """Rows to train on: files (.jsonl, .json, .csv, .parquet, packed or not), globs of them, or datasets of the Hugging Face
    hub (name, name:config, name@split)."""
    val: list[File] = []
    """Rows that mu is learned on; default: `val_share` of those of `train`."""
    test: list[File] = []
    """Rows to evaluate on; default: `test_share` of those of `train`."""
    val_share: float = Field(0.1, ge=0, lt=1)
    """Share of the training prompts held out for validation (at least two), by a hash of their text."""
    test_share: float = Field(0.1, ge=0, lt=1)
    """Share of the training prompts held out for the test (at least one)."""
    prompt: str = Field("prompt", min_length=1)
    """Column with the prompt: a text, or a list of messages with role and content."""
    response: str = Field("response", min_length=1)
    """Column with the demonstration, where a row has one: a text, or a list with an assistant's message."""
    system_prompt: str = ""
    """System prompt of rows that bring none."""
    rewards: list[File] = []
    """Rewards: FILE.py:NAME, MODULE:NAME, or math, format, length, regex, json_schema, code. docs/rewards.md."""
    weights: list[float] | None = None
    """Weight of each reward in their sum; default: 1 each."""
    success: str = ""
    """What counts as solved: a reward's name (it is 1 or more) or a threshold, as in 'short >= 0.5'; `reward` is the weighted
    sum. Default: the first reward."""
    reward_timeout_s: float = Field(300.0, gt=0)
    """A reward that does not return in this time ends the run, with its state saved."""
    thinking: bool = False
    """Reward format: look for <think> ... </think> before the answer too."""
    length: tuple[int, int] = (1, 2000)
    """Reward length: fewest and most characters that earn 1."""
    pattern: str = ""
    """Reward regex: what is searched for, in rows without a column `pattern`."""
    json_schema: File = ""
    """Reward json_schema: file with the schema, for rows without a column `schema`."""
    allow_code: bool = False
    """Reward code runs what the policy has written, in a subprocess with limits but on this machine: it must be asked for."""
    code_seconds: float = Field(5.0, gt=0)
    """Reward code: processor time of one program with its tests."""
    code_memory_mb: int = Field(512, ge=64)
    """Reward code: memory of one program."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.weights is not None and len(self.weights) != len(self.rewards):
            raise ValueError(
                f"weights must be one for each of the {len(self.rewards)} rewards, got {len(self.weights)}: {self.weights}"
            )
        if not 0 <= self.length[0] <= self.length[1]:
            raise ValueError(f"length must be the fewest and the most characters, got {list(self.length)}")
        check_shares(self, "rows for training")
        return self


class GymConfig(Section):
    """Generated problems of the package reasoning-gym (task.name reasoning_gym:NAME); see tasks/gym/. Their own parameters
    are `task.options`."""

    train_size: int = Field(1000, ge=1)
    """Training problems generated."""
    val_size: int = Field(128, ge=0)
    """Validation problems, from seeds of their own."""
    test_size: int = Field(200, ge=0)
    """Test problems, from seeds of their own."""
    seed: int = Field(0, ge=0)
    """First seed: problem i has seed + i, test before val before train."""
    system_prompt: str | None = None
    """System prompt; default: ours, empty: none."""
    answer_tags: bool = True
    """Read the answer between <answer> and </answer>; false: the whole response is the answer."""
    score_seconds: float = Field(10.0, gt=0)
    """Processor time in which an answer must be judged, else it earns 0."""


class VerifiersConfig(Section):
    """Environments of the package verifiers (task.name verifiers:NAME); see tasks/verifiers/. The taskset's own settings are
    `task.options`."""

    max_tasks: int = Field(1000, ge=1, le=10**7)
    """Tasks taken from the taskset, from its first on."""
    val_share: float = Field(0.1, ge=0, lt=1)
    """Share of the tasks held out for validation (at least two), by a hash of what they hold."""
    test_share: float = Field(0.1, ge=0, lt=1)
    """Share of the tasks held out for the test (at least one)."""
    max_turns: int = Field(1, ge=1, le=100)
    """The policy's answers in one episode; the environment judges what there is then."""
    success: float = 1.0
    """Reward from which on an episode counts as solved."""
    seconds: Seconds = 300.0
    """How long the environment may take from an answer to its next question or its verdict."""

    @model_validator(mode="after")
    def _check(self) -> VerifiersConfig:
        check_shares(self, "tasks for training")
        return self


PLUG_INS = "amft_fast.tasks"  # entry points of other packages that offer tasks


SHIPPED = ("general_points", "virl", "math", "data")


class TaskConfig(Section):
    """What is learned."""

    name: File = "general_points"
    """The task. general_points, virl, math or data, whose settings are in the sub-section of the same name; a class of one's
    own as FILE.py:CLASS or MODULE:CLASS; reasoning_gym:NAME or verifiers:NAME, with the sections `gym` and `verifiers`; or
    a plug-in's name. docs/tasks.md."""
    options: dict[str, Any] = {}
    """Settings of a task that is not shipped (--task.options.key value), typed by its class's `Options` or constructor."""
    general_points: GeneralPointsConfig = GeneralPointsConfig()
    virl: VirlConfig = VirlConfig()
    math: MathConfig = MathConfig()
    data: DataConfig = DataConfig()
    gym: GymConfig = GymConfig()
    verifiers: VerifiersConfig = VerifiersConfig()

    @model_validator(mode="after")
    def _check(self) -> TaskConfig:
        if self.name in SHIPPED:
            if self.options:
                raise ValueError(
                    f"options are for tasks that are not shipped; the settings of {self.name} are --task.{self.name}.*, got "
                    f"{', '.join(self.options)}"
                )
        elif ":" not in self.name and not entry_points(group=PLUG_INS, name=self.name):
            known = [*SHIPPED, *(point.name for point in entry_points(group=PLUG_INS))]
            close = difflib.get_close_matches(self.name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"those are {', '.join(known)}"
            raise ValueError(
                f"name must be a shipped or installed task, FILE.py:CLASS or MODULE:CLASS, got {self.name!r}; {hint}"
            )
        return self

    @property
    def section(self) -> Section | None:
        """The settings of the task that is asked for; None for one that is not shipped."""
        return getattr(self, self.name) if self.name in SHIPPED else None
