"""The typed configuration: one TOML file, overridden by dotted flags (`--controller.mu_init 0.7`). Imports no torch.

Every section is a pydantic model that refuses unknown keys; the text under a field is its help. config_file.py turns a file and
flags into a `Config`.
"""

from __future__ import annotations

import difflib
import os
from importlib.metadata import entry_points
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from amft_fast.methods import METHODS

# What no setting may go beyond: whole numbers of torch and numpy have 64 bits, and most others become fp32.
MAX_INT, MAX_FLOAT = 2**63 - 1, 3.4028234663852886e38


def clean_path(text: str) -> str:
    """`text` with ~ and ~user at its start as a shell reads them. Raises ValueError for what no file system takes."""
    check_text(text)
    if text.startswith("~"):
        text = os.path.expanduser(text)
        if text.startswith("~"):
            raise ValueError(f"names a home that is not here: {text.partition('/')[0]!r}")
    if len(text.encode()) > 4095 or any(len(part.encode()) > 255 for part in text.split("/")):
        raise ValueError(
            f"is too long for a path: 4095 bytes in all and 255 between slashes, got {len(text.encode())} bytes"
        )
    return text


def check_text(text: str) -> None:
    """Raises ValueError for what cannot be written to a file's name or to a text file."""
    if "\0" in text:
        raise ValueError(f"holds a NUL character, got {text[:40]!r}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"is not valid Unicode, got {text[:40]!r}") from None


def _clean_source(text: str) -> str:
    """A file or dataset, or name=file or dataset."""
    name, equals, path = text.rpartition("=")
    return name + equals + clean_path(path)


def _check(value: Any) -> None:
    """Raises ValueError for numbers and texts that fit no setting."""
    if isinstance(value, str):
        check_text(value)
    elif isinstance(value, int) and abs(value) > MAX_INT:
        raise ValueError(f"must fit into 64 bits, got a number of {value.bit_length()} bits")
    elif isinstance(value, float) and abs(value) > MAX_FLOAT:
        raise ValueError(f"must fit into fp32, got {value:g}")
    elif isinstance(value, list | tuple):
        for item in value:
            _check(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check(key)
            _check(item)


FilePath = Annotated[str, AfterValidator(clean_path)]
# A file or folder (or name=file): when it is relative and not under the working directory, it is looked up beside the config
# file. What is there under no such name is left as it is: it may be a name on the hub.
FILE = "file"
File = Annotated[str, FILE, AfterValidator(_clean_source)]
Seed = Annotated[int, Field(ge=0, le=MAX_INT)]
Tokens = Annotated[int, Field(ge=1, le=2**24)]  # in one sequence
Rows = Annotated[int, Field(ge=1, le=2**20)]  # at once in memory
Seconds = Annotated[float, Field(gt=0, le=1e7)]  # what timers take
# Outside these bounds fp32 logits divided by it are all equal, or overflow.
Temperature = Annotated[float, Field(ge=1e-4, le=1e4)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, docstrings under fields are their descriptions.

    Numbers are finite, fit into 64 bits or fp32, and are no booleans; texts can be written to files.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and kind is not bool and bool not in get_args(kind):
            raise ValueError(f"takes no true or false, got {str(value).lower()}")
        return value

    @field_validator("*")
    @classmethod
    def _fits(cls, value: Any) -> Any:
        _check(value)
        return value


def check_shares(section: Any, what: str) -> None:
    """Raises ValueError when validation and test together leave nothing to train on."""
    if section.val_share + section.test_share >= 1:
        raise ValueError(f"val_share + test_share must leave {what}, got {section.val_share} + {section.test_share}")


class RunConfig(Section):
    """Where a run lives and what makes it repeatable."""

    dir: Annotated[FilePath, Field(min_length=1)] = "runs/run"
    """Folder of the run; made if missing. A run that is already there is refused unless `--resume` or `overwrite`."""
    seed: Seed = 0
    """Seed of everything: data order, samples, new parameters."""
    overwrite: bool = False
    """Delete an earlier run in `dir` instead of refusing to start."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes CUDA when there is one."""
    threads: int | None = Field(None, ge=1, le=1024)
    """CPU threads for torch; default: OMP_NUM_THREADS, else as many as make a pass of the model faster, timed at the start
    (on a GPU torch's own choice). How sums are rounded depends on it: set it where two runs must be equal to the last bit."""


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


class LoraConfig(Section):
    """Training of small factors beside frozen linear layers (peft); off at rank 0."""

    rank: int = Field(0, ge=0, le=65536)
    """Rank of the factors; 0 trains the weights themselves."""
    alpha: float | None = Field(None, gt=0)
    """The factors' product counts alpha / rank times; default: 2 rank."""
    targets: list[str] = ["all-linear"]
    """Names of the layers that get factors (q_proj, ..., embed_tokens where it is not tied); all-linear: all linear ones but
    the output embedding."""


class ModelConfig(Section):
    """The policy: a transformers causal language model."""

    path: File = ""
    """Folder of a transformers checkpoint, or a hub name. Relative folders are looked up from the working directory,
    then from the config file's folder."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the parameters in the forward pass; auto: bf16 on CUDA (with fp32 master weights), fp32 on CPU."""
    rope_theta: float | None = Field(None, gt=0)
    """Base of the rotary position embedding, instead of the checkpoint's (40000 stretches Qwen2.5-Math to 16 k tokens)."""
    max_position_embeddings: Tokens | None = None
    """Longest context, instead of the checkpoint's."""
    vision: Literal["trained", "projector", "frozen"] = "trained"
    """What of a vision-language model's eyes is trained. projector: what carries the tower's output into the language model,
    but not the tower; frozen: neither."""
    max_pixels: int | None = Field(None, ge=1)
    """Images with more pixels are made smaller (models with image tokens by size: Qwen-VL); default: the checkpoint's."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4"] = "auto"
    """Attention in training; auto: the first that is there of FlashAttention 4, 3, 2, torch's varlen, SDPA (attention.py)."""
    gradient_checkpointing: bool | Literal["selective"] = False
    """Recompute each layer's activations in the backward pass; selective: all but matrix products and attention."""
    offload_activations: bool = False
    """Keep the activations that the backward pass needs in host memory (GPU)."""
    mlp_tile: Tokens | None = None
    """Tokens that the MLP of a layer takes at a time, recomputed in the backward pass (DeepSpeed's TiledMLP); default: all."""
    liger: bool | None = None
    """Liger's kernels for norms, rotary embedding and MLP; default: on a GPU where liger-kernel is installed."""
    compile: bool = False
    """Compile each layer with torch.compile; rollouts run it as it is."""
    router_aux_coef: float = Field(0.0, ge=0)
    """Weight of the loss that keeps the experts of a mixture evenly loaded (model/experts.py); Qwen3 says 0.001."""
    lora: LoraConfig = LoraConfig()


class TrainConfig(Section):
    """The method and the size of a step."""

    method: Literal[tuple(METHODS)] = "amft"
    """amft learns mu; fixed, linear, cosine and chord_mu are schedules of mu; sft, rl and sft_then_rl are what they
    say; the rest mixes in ways of its own: docs/methods.md."""
    steps: int = Field(200, ge=1, le=10**9)
    """Steps after the warm-up. A step draws rollouts once and makes `minibatches_per_rollout` updates."""
    token_budget: int | None = Field(None, ge=1)
    """End after so many tokens instead of `steps`: tokens sampled plus tokens trained on, the controller's own included.
    Schedules and evaluations are then spread over the budget as they are over `steps` otherwise."""
    warmup_steps: int = Field(0, ge=0, le=10**9)
    """Updates on demonstrations alone before the first step; the entropy target is measured after them."""
    lr: float = Field(1e-6, gt=0)
    """Peak learning rate of the policy."""
    sft_lr: float | None = Field(None, gt=0)
    """Learning rate of updates that only imitate: the warm-up, method sft, first stage of sft_then_rl. Default: lr."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate over the steps after its warm-up, down to a tenth of the peak."""
    lr_warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises from 0."""
    sft_share: float = Field(0.3, gt=0, lt=1)
    """Share of the steps that sft_then_rl spends on demonstrations."""
    sft_stop: Literal["share", "saturation"] = "share"
    """When sft_then_rl turns to RL. share: after sft_share; saturation: once the loss of held-out demonstrations has stopped
    falling, at the latest after sft_share."""
    sft_check_every: int = Field(10, ge=1)
    """Steps between looks at that loss, on at most meta.prompts demonstrations of the split val."""
    sft_patience: int = Field(3, ge=1)
    """Looks in a row without gain after which it has stopped."""
    sft_tolerance: float = Field(0.005, ge=0, lt=1)
    """Share of the best loss so far by which a look must be under it to be a gain."""
    prompts_per_step: Rows = 64
    """Prompts per rollout; each is answered rollout.num_generations times."""
    demos_per_step: Rows = 64
    """Demonstrations per step, shared out over the minibatches."""
    minibatches_per_rollout: Rows = 1
    """Optimizer updates per rollout. With 1 the ratio is 1 and the clip never acts."""
    micro_batch_tokens: int = Field(16384, ge=1, le=2**31 - 1)
    """Bound on the tokens (padding included) of one forward pass; changes memory and speed, never the result."""
    packing: bool | None = None
    """Pack sequences into rows without padding, a prompt's answers sharing its tokens; default: where attention allows it."""
    skip_flat: bool = True
    """Leave rollouts that reach no gradient (a group's rewards are all equal) out of the update; changes speed, never the
    gradient."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """The optimizer of the policy."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""
    adam_eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay on matrices (not on norms and biases)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient clipping by global norm."""
    data_workers: int = Field(2, ge=0, le=256)
    """Threads that read and tokenise the next step's demonstrations while a step runs; 0: none."""
    max_bad_steps: int = Field(5, ge=1)
    """Stop, with the state saved, after so many updates in a row whose loss or gradient was not finite."""

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        for name in ("prompts_per_step", "demos_per_step"):
            if getattr(self, name) % self.minibatches_per_rollout:
                raise ValueError(
                    f"{name} must be divisible by minibatches_per_rollout, "
                    f"got {getattr(self, name)} and {self.minibatches_per_rollout}"
                )
        for beta in self.adam_betas:
            if not 0 <= beta < 1:
                raise ValueError(f"adam_betas must lie in [0, 1), got {list(self.adam_betas)}")
        return self


# The head knows the first from a token's log-prob alone; the second need a statistic of the sequence or batch first
# (losses.py).
TOKEN_LOSSES = ("grpo", "cispo", "sapo", "dppo", "dro")
WHOLE_LOSSES = ("gspo", "gmpo", "vespo", "clip_cov", "kl_cov")
Pair = tuple[float, float]


class ObjectiveConfig(Section):
    """The loss of the exploration part; its maths is in objective.py and losses.py."""

    loss: File = "grpo"
    """The policy gradient: grpo (clipped), cispo, sapo, dppo, dro; by sequence gspo, gmpo, vespo; by the batch's covariance of
    log-prob and advantage clip_cov, kl_cov; or a function of one's own, FILE.py:NAME or MODULE:NAME. docs/methods.md."""
    denominator: Literal["token", "sequence", "constant"] = "token"
    """What L_RL is a mean over. token: all tokens of the update; sequence: sequences, each the mean of its tokens (GRPO, GSPO,
    SAPO); constant: sequences times rollout.max_new_tokens (Dr.GRPO)."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    """Lower clip range: the ratio is held above 1 - clip_low (grpo, clip_cov; gspo: the sequence's)."""
    clip_high: float = Field(0.2, gt=0)
    """Upper clip range: the ratio is held below 1 + clip_high."""
    dual_clip: float | None = Field(None, gt=1)
    """Bound on the loss of tokens with a negative advantage, as a multiple of it (grpo, clip_cov)."""
    ratio_cap: float | None = Field(None, gt=0)
    """Cap of the ratio as a constant weight; default: 5 for cispo, 20 for dppo."""
    sapo_tau_positive: float = Field(1.0, gt=0)
    """Temperature of sapo's gate for positive advantages."""
    sapo_tau_negative: float = Field(1.05, gt=0)
    """The same for all others."""
    dppo_bound: float = Field(0.2, gt=0, lt=1)
    """How far a token's probability may have moved with the advantage's sign before dppo drops it."""
    ratio_penalty: float = Field(0.0, ge=0)
    """Weight of log(ratio)^2 / 2, added to any loss: dro's regulariser."""
    gmpo_clip: float = Field(0.4, gt=0)
    """gmpo: clip range of a token's log-ratio."""
    vespo_positive: Pair = (2.0, 3.0)
    """vespo: k and lambda of the weight exp(lambda + k log w - lambda w) for advantages of 0 and more."""
    vespo_negative: Pair = (3.0, 2.0)
    """The same for negative advantages."""
    cov_share: float | None = Field(None, gt=0, le=1)
    """Share of the tokens that clip_cov leaves out (default 2e-4), or that kl_cov holds back (default 2e-3)."""
    clip_cov_bounds: Pair = (1.0, 5.0)
    """clip_cov: covariances between which tokens are drawn by lot."""
    kl_cov_coef: float = Field(1.0, ge=0)
    """kl_cov: weight of |log ratio| on the tokens of highest covariance."""
    entropy_share: float = Field(1.0, gt=0, le=1)
    """Share of an update's tokens, those of highest entropy, that the policy gradient acts on (0.2 in arXiv
    2506.01939); costs a forward pass."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the entropy bonus in L_RL. Where no answer earns anything, the bonus alone drives the policy."""
    entropy_target: float | None = Field(None, ge=0)
    """Entropy in nats per token that the weight of the bonus is steered to, from entropy_coef on: up a step below it, down one
    above it."""
    entropy_step: float = Field(1e-3, gt=0)
    """The step of entropy_target."""
    entropy_coef_max: float = Field(0.1, gt=0)
    """Largest weight that entropy_target may reach."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the estimate of KL(policy || reference); the reference is the policy after the warm-up."""
    kl_kind: Literal["k1", "k2", "k3"] = "k3"
    """The estimate: k1 -d, k2 d^2 / 2, k3 exp(d) - d - 1, with d = log-prob of the reference less the policy's. As a
    loss k1 has a gradient of mean 0 and k2 that of the KL."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where it is counted: as a term of the loss, or off the reward of a sample (gae: of each token)."""
    tis_cap: float | None = Field(None, ge=0)
    """Cap of the importance weight between trainer and rollout engine; 0: off; default: 2 with vLLM, off with
    the transformers engine, whose log-probs are the trainer's."""
    correction: Literal["tis", "mis", "icepop"] = "tis"
    """What that weight does. tis: it is held at tis_cap; mis: it counts 0 above tis_cap; icepop: 0 outside icepop_bounds."""
    correction_level: Literal["token", "sequence"] = "token"
    """Whether it is a token's, or the product over a sequence."""
    icepop_bounds: Pair = (0.5, 5.0)
    """Outside them icepop leaves a token, or a sequence, out."""
    sequence_ratio_bounds: Pair | None = None
    """Leave out sequences whose geometric mean of policy over sampler is outside these bounds."""
    sequence_kl_max: float | None = Field(None, ge=0)
    """Leave out sequences of negative advantage on which the sampler's log-prob exceeds the policy's by more than this on the
    mean (DeepSeek-V3.2)."""
    max_staleness: int | None = Field(None, ge=0)
    """Steps of age from above which a token has no weight in the policy gradient (it counts in the denominator); below
    rollout.async_steps. Default: all tokens that are drawn ahead have theirs."""

    @model_validator(mode="after")
    def _check(self) -> ObjectiveConfig:
        if ":" not in self.loss and self.loss not in TOKEN_LOSSES + WHOLE_LOSSES:
            known = TOKEN_LOSSES + WHOLE_LOSSES
            close = difflib.get_close_matches(self.loss, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"those are {', '.join(known)}"
            raise ValueError(f"loss must be a known one, FILE.py:NAME or MODULE:NAME, got {self.loss!r}; {hint}")
        for name in ("vespo_positive", "vespo_negative"):
            if min(getattr(self, name)) <= 0:
                raise ValueError(f"{name} must be k > 0 and lambda > 0, got {list(getattr(self, name))}")
        for name in ("icepop_bounds", "sequence_ratio_bounds", "clip_cov_bounds"):
            bounds = getattr(self, name)
            if bounds is not None and not bounds[0] < bounds[1]:
                raise ValueError(f"{name} must be the lower and the upper bound, got {list(bounds)}")
        return self

    @property
    def whole(self) -> bool:
        """Whether the loss is one of whole sequences or of the batch."""
        return self.loss in WHOLE_LOSSES

    @property
    def reads_entropy(self) -> bool:
        """Whether the loss asks for the entropy of each token, at the present weights."""
        return self.entropy_share < 1

    @property
    def reads_logprobs(self) -> bool:
        """Whether the loss asks for the present log-probs of whole sequences."""
        masks = self.sequence_ratio_bounds is not None or self.sequence_kl_max is not None
        return self.whole or masks or (self.corrects and self.correction_level == "sequence")

    @property
    def corrects(self) -> bool:
        """Whether what the rollout engine drew is corrected for."""
        return bool(self.tis_cap) or self.correction == "icepop"


GROUP_KINDS = ("grpo", "dr_grpo", "rloo", "opo", "gpg", "reinforce++_baseline", "maxrl")  # the baseline is the group's


class AdvantageConfig(Section):
    """How rewards become advantages; see advantages.py."""

    kind: Literal[
        "grpo", "dr_grpo", "rloo", "reinforce++", "opo", "gpg", "reinforce++_baseline", "maxrl", "gae", "distill"
    ] = "grpo"
    """The estimator; distill: none, a token's advantage is the teacher's alone."""
    teacher: File = ""
    """A transformers model, folder or hub name, with the policy's tokenizer, for on-policy distillation: its log-prob less the
    policy's is added to each token's advantage."""
    teacher_coef: float = Field(1.0, gt=0)
    """Weight of what the teacher adds."""
    rewards: dict[str, float] = {}
    """Rewards that are normalised one by one (by kind, in their group) and added up with these weights, then brought to the
    batch's spread (GDPO): names of what a task reports of a sample. Default: the one reward of the task."""
    level: Literal["trajectory", "turn"] = "trajectory"
    """What a turn's tokens are credited with, in tasks of several turns. trajectory: the sample's whole reward; turn: the
    reward from that turn on, compared with the group's turns in the same state. gae credits tokens by itself."""
    turn_gamma: float = Field(1.0, ge=0, le=1)
    """Discount per turn of the rewards of later turns (level turn); 0 credits a turn with its own reward alone."""
    truncated: Literal["kept", "masked"] = "kept"
    """What becomes of answers that were cut at rollout.max_new_tokens. masked: no token of them is trained on; their rewards
    count in their group all the same."""
    overlong_buffer: int = Field(0, ge=0)
    """Tokens before rollout.max_new_tokens over which the reward falls by overlong_penalty (DAPO); 0: off."""
    overlong_penalty: float = Field(1.0, ge=0)
    """What an answer of rollout.max_new_tokens loses by overlong_buffer."""
    length_penalty: float = Field(0.0, ge=0)
    """What an answer of rollout.max_new_tokens loses where the whole group is right; in proportion to length and to the
    group's share of right answers (at least one of them)."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount per token (gae)."""
    lam: float = Field(0.95, ge=0, le=1)
    """Lambda of the generalised advantage estimate (gae)."""
    value_coef: float = Field(0.1, ge=0)
    """Weight of the value loss in L_RL (gae)."""
    value_lr: float = Field(5e-6, gt=0)
    """Learning rate of the value head (gae)."""

    @model_validator(mode="after")
    def _check(self) -> AdvantageConfig:
        by_turn = ("grpo", "dr_grpo", "rloo", "reinforce++", "gae")
        if self.level == "turn" and self.kind not in by_turn:
            raise ValueError(f"level turn is there for kind {', '.join(by_turn[:-1])}, got {self.kind!r}")
        if self.kind == "distill" and not self.teacher:
            raise ValueError("kind distill needs a teacher, got none")
        if self.kind == "gae" and self.teacher:
            raise ValueError("teacher adds to advantages by answer: kind must not be gae")
        if self.rewards and (self.kind == "gae" or self.level == "turn"):
            raise ValueError("rewards are normalised by sample: kind must not be gae, nor level turn")
        return self


class MixtureConfig(Section):
    """Constants of the methods that mix imitation and exploration in ways of their own; see mixtures/ and docs/methods.md."""

    demo_reward: float = 1.0
    """What a demonstration in its prompt's group counts as having earned (luffy, srft)."""
    luffy_gamma: float = Field(0.1, gt=0)
    """gamma of the weight p / (p + gamma) of a demonstration's tokens (luffy, srft)."""
    srft_demo: float = Field(0.5, ge=0)
    """Weight of a demonstration, times exp(-entropy) (srft)."""
    srft_rollout: float = Field(0.1, ge=0)
    """Weight of a right rollout, times exp(entropy) (srft)."""
    chord_mu: Pair = (0.9, 0.05)
    """First and last mu of chord_mu."""
    chord_steps: int = Field(200, ge=1)
    """Steps over which chord_mu falls; then it is held."""
    chord_phi_mu: float = Field(0.1, gt=0, lt=1)
    """mu of chord_phi."""
    hpt_gate: int = Field(0, ge=0)
    """Right answers up to which a prompt is imitated and not explored (hpt; 2 for Llama in the paper)."""
    hpt_demo_weight: float = Field(1.0, gt=0)
    """Weight of imitation there (hpt; 0.3 for a model of 1.5 B in the paper)."""
    relift_buffer: int = Field(128, ge=1)
    """Unsolved prompts that make an update on their demonstrations (relift)."""
    relift_entropy: float = Field(0.001, ge=0)
    """Weight of the entropy bonus in that update (relift)."""
    uft_pieces: int = Field(5, ge=1, le=1000)
    """Pieces of a demonstration, the first of which are the hint (uft)."""
    uft_probability: Pair = (0.95, 0.05)
    """Chance of each piece, at the start and when hints end (uft)."""
    uft_share: float = Field(0.6, gt=0, le=1)
    """Share of the run with hints (uft)."""
    uft_hint_weight: float = Field(0.001, ge=0)
    """Weight of the hint's likelihood (uft)."""
    prefix_share: Pair = (0.95, 0.05)
    """Share of the demonstration that is the prefix, at the start and the end (prefix_rft)."""
    prefix_entropy_share: float = Field(0.2, gt=0, le=1)
    """Share of a prefix's tokens, those of highest entropy, that are trained on (prefix_rft)."""
    gac_every: int = Field(5, ge=1)
    """Steps between measurements of the gradients' noise (gac): each costs the backward pass of a step."""
    gac_memory: float = Field(0.8, ge=0, lt=1)
    """Decay per measurement of what was measured before (gac)."""
    gac_max_step: float = Field(0.1, gt=0, le=1)
    """Bound on mu's move at a measurement (gac)."""

    @model_validator(mode="after")
    def _check(self) -> MixtureConfig:
        for name in ("chord_mu", "uft_probability", "prefix_share"):
            if not all(0 <= x <= 1 for x in getattr(self, name)):
                raise ValueError(f"{name} must lie in [0, 1], got {list(getattr(self, name))}")
        return self


class ControllerConfig(Section):
    """The mixing weight mu of L = mu L_SFT + (1 - mu) L_RL, and how it is learned; see controller.py."""

    mu_init: float = Field(0.5, gt=0, lt=1)
    """Where mu starts; method `fixed` holds it there."""
    mu_min: float = Field(0.02, gt=0, lt=1)
    """Lower bound of a learned mu."""
    mu_max: float = Field(0.98, gt=0, lt=1)
    """Upper bound of a learned mu."""
    schedule_start: float = Field(0.9, ge=0, le=1)
    """First mu of the methods linear and cosine."""
    schedule_end: float = Field(0.1, ge=0, le=1)
    """Last mu of the methods linear and cosine."""
    signal: Literal["blocks", "lot", "balanced", "cosine", "rms", "raw", "random"] = "blocks"
    """How mu is learned. blocks: 1 as long as imitation shows on held-out prompts, then 0 (controller/blocks.py); lot: a
    control that decides by lot at the same moments. The others move mu by the probe's dot-products over windows
    (controller/windows.py); random is a control with the sign of balanced drawn by lot."""
    imitation_share: float = Field(0.06, gt=0, le=1)
    """Share of the run's compute of the first block of imitation (blocks)."""
    confidence: float = Field(2.0, ge=0)
    """Standard errors by which a block of imitation must have raised held-out rewards and the likelihood of held-out
    demonstrations, taken together, to stay (any, once one has stayed), and by which rewards must have fallen for a block
    to be taken back (blocks)."""
    look_prompts: int | None = Field(None, ge=2, le=2**20)
    """Held-out prompts of a look, with `meta.num_generations` answers each (blocks); default: twice `train.prompts_per_step`,
    between 32 and 64."""
    look_demos: int | None = Field(None, ge=8, le=2**20)
    """Held-out demonstrations whose likelihood a look reads (blocks), where the task has some; default: eight times
    `train.prompts_per_step`, between 32 and 256."""
    min_alive: float = Field(0.1, ge=0, le=1)
    """Share of the held-out prompts whose answers earned differently, or are all right, under which nothing is explored
    (blocks)."""
    solved: float = Field(0.9, ge=0, le=1)
    """Share of right answers over which imitation that has shown before goes on (blocks)."""
    space: Literal["mu", "logit"] = "logit"
    """Whether steps are taken in mu itself or in its logit."""
    window: int = Field(5, ge=1)
    """Steps over which the signal is averaged before mu moves once; one utility gradient serves them all."""
    start_step: int = Field(0, ge=0)
    """Steps after the warm-up before the first window."""
    eta_mu: float = Field(15.0, ge=0)
    """Gain from the signal to mu (or its logit)."""
    max_step: float = Field(0.7, gt=0)
    """Bound on the signal's part of one move."""
    eta_entropy: float = Field(0.2, ge=0)
    """Gain from the entropy's shortfall H* - H (nats per token) to mu (or its logit)."""
    snr_gate: float = Field(1.5, ge=0)
    """Signal-to-noise ratio under which the signal moves nothing: its step is scaled by max(0, 1 - (snr_gate / SNR)^2).
    0: no gate."""
    noise_memory: float = Field(0.7, ge=0, lt=1)
    """Decay per window of the running estimate of the signal's standard error."""

    @model_validator(mode="after")
    def _check(self) -> ControllerConfig:
        if not self.mu_min < self.mu_max:
            raise ValueError(f"mu_min must be below mu_max, got {self.mu_min} and {self.mu_max}")
        return self


class MetaConfig(Section):
    """The utility gradient, whose products with the two gradients tell mu where to go; see meta_gradient.py."""

    utility: Literal["reward", "nll", "hybrid"] = "reward"
    """reward: policy gradient on rollouts of held-out prompts; nll: likelihood of held-out demonstrations; hybrid: reward,
    and the demonstration where no rollout of a prompt succeeds."""
    prompts: int = Field(128, ge=2, le=2**20)
    """Validation prompts that the utility is taken on."""
    num_generations: int = Field(8, ge=2, le=2**20)
    """Rollouts per validation prompt."""
    refresh_share: float = Field(0.125, gt=0, le=1)
    """Share of the cached rollouts redrawn for each new utility gradient, oldest first; 1: all of them."""
    memory: float = Field(0.8, ge=0, lt=1)
    """Decay of the utility gradient from window to window. 0: taken anew on the whole cache, with importance weights. Above 0
    only the groups just drawn enter, and the past lives on as an exponential average: much cheaper, somewhat staler."""
    min_ess: float = Field(0.3, ge=0, le=1)
    """Relative effective sample size of the cache's importance weights under which it is redrawn whole."""
    is_cap: float = Field(2.0, gt=0)
    """Cap of the token-level importance weights of cached rollouts."""
    demo_weight: float = Field(1.0, gt=0)
    """Weight of a demonstration against a rollout group in the hybrid utility."""
    precondition: Literal["auto", "none", "plain", "exact"] = "auto"
    """The optimizer's Jacobian in the signals raw and rms: none (SGD), AdamW's plain or exact diagonal; auto: by optimizer."""


class VllmConfig(Section):
    """vLLM as the rollout engine; docs/rollouts.md says which mode when."""

    mode: Literal["colocate", "server"] = "colocate"
    """colocate: one engine per trainer process, on its device; server: servers apart, spoken to over HTTP."""
    num_servers: int = Field(1, ge=1, le=1024)
    """Servers that the trainer starts itself (mode server without `urls`)."""
    urls: list[str] = []
    """Servers that run already (http://HOST:PORT), instead of starting any; docs/rollouts.md says how they must be started."""
    devices: list[str] = []
    """CUDA_VISIBLE_DEVICES of each server that is started; default: one GPU each, after those of the trainer."""
    host: str = "127.0.0.1"
    """Where started servers listen, and where the weights' process group meets. Other than localhost it needs `api_key_env`."""
    api_key_env: str = ""
    """Environment variable with the servers' API key; default: a random key per started server."""
    python: FilePath = ""
    """Python that runs started servers, where vLLM lives in an environment of its own; default: the trainer's."""
    backend: Literal["auto", "nccl", "ipc", "gloo"] = "auto"
    """How weights travel; auto: gloo on a CPU, ipc to a colocated engine on a GPU, nccl to servers on other GPUs."""
    adapter_only: bool = False
    """With model.lora.rank: engines read the base from model.path and are given the factors alone, in a folder under run.dir
    that they must see. Else they are given merged weights."""
    bucket_bytes: int = Field(1 << 28, ge=1 << 10, le=1 << 40)
    """Size of the packed buckets that weights travel in."""
    tensor_parallel_size: int = Field(1, ge=1, le=1024)
    """GPUs per engine."""
    gpu_memory_utilization: float = Field(0.5, gt=0, lt=1)
    """Share of a GPU's memory for the engine (a colocated one gives it back while the trainer works)."""
    kv_cache_bytes: int | None = Field(None, ge=1 << 20)
    """Memory for keys and values, instead of a share of the GPU; default on a CPU: that of two of the longest sequences, from
    256 MiB to 2 GiB."""
    max_model_len: int | None = Field(None, ge=2, le=2**24)
    """Longest prompt with its answer; default: the model's own bound."""
    max_num_seqs: Rows = 256
    """Sequences that an engine decodes at once."""
    enforce_eager: bool | None = None
    """No CUDA graphs and no compilation; default: on a CPU only."""
    sleep: bool = True
    """Whether a colocated engine on a GPU gives its memory back while the trainer works."""
    start_timeout_s: Seconds = 600.0
    """How long a server may take to come up."""
    call_timeout_s: Seconds = 60.0
    """Bound of every control call, and of a whole transfer of weights."""
    generate_timeout_s: Seconds = 1800.0
    """Bound of one request for a prompt's answers."""
    health_every_s: Seconds = 5.0
    """Seconds between health checks while rollouts are drawn."""
    health_timeout_s: Seconds = 10.0
    """A server that does not answer its health check in this time counts as hung."""
    max_retries: int = Field(3, ge=0)
    """How often one batch of rollouts, or one transfer of weights, is tried again."""
    max_restarts: int = Field(5, ge=0)
    """How often in a run one server is started again."""

    @model_validator(mode="after")
    def _check(self) -> VllmConfig:
        if self.host not in ("127.0.0.1", "localhost", "::1") and not self.api_key_env:
            raise ValueError(
                f"host {self.host!r} opens the servers' development routes to a network: name the environment variable that "
                "holds an API key in api_key_env, or keep 127.0.0.1"
            )
        if self.devices and len(self.devices) != self.num_servers:
            raise ValueError(f"devices must name one set per server, got {len(self.devices)} for {self.num_servers}")
        return self


class RolloutConfig(Section):
    """How the policy's own answers are drawn for training."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """transformers: in-process, shares the trainer's weights; vllm: vLLM, with the weights sent to it in place."""
    vllm: VllmConfig = VllmConfig()
    async_steps: int = Field(0, ge=0, le=8)
    """0: exactly on-policy; above: rollouts of so many steps to come are drawn while a step trains, and none is trained on
    that is older than so many steps (vllm, mode server)."""
    in_flight: bool = False
    """Give servers new weights in the midst of answers, which go on with them: nothing waits for what is drawn ahead, and
    tokens of one answer are of several versions (async_steps above 0)."""
    recompute_kv: bool = False
    """In flight: whether keys and values of what was drawn before an update are computed anew with the new weights."""
    mismatch_warn: float = Field(0.05, gt=0)
    """Mean |log-prob difference| between rollout engine and trainer from which on a step warns."""
    num_generations: Rows = 8
    """Answers per prompt: the group of group-relative advantages."""
    temperature: Temperature = 1.0
    """Sampling temperature; the loss uses the same."""
    top_p: float = 1.0
    """Must stay 1: the trainer cannot reproduce a truncated distribution (evaluation may truncate, see eval.top_p)."""
    top_k: int = Field(0)
    """Must stay 0, as top_p must stay 1."""
    min_p: float = 0.0
    """Must stay 0, as top_p must stay 1."""
    max_new_tokens: Tokens = 1024
    """Bound on the tokens of one turn."""
    max_batch: Rows = 512
    """Sequences decoded at once by the transformers engine; changes memory and speed only."""
    max_batch_tokens: int | None = Field(None, ge=1)
    """Bound on the tokens (prompts padded to the longest, plus max_new_tokens each) of the sequences that the transformers
    engine decodes at once: prompts come in buckets by length. Changes memory and speed only; default: max_batch alone."""
    dynamic_sampling: bool = False
    """Replace groups whose rewards are all equal, which teach nothing, by groups of the next prompts."""
    max_redraws: int = Field(3, ge=1, le=1000)
    """How often in a step dynamic sampling replaces; groups that are flat then stay."""

    @model_validator(mode="after")
    def _check(self) -> RolloutConfig:
        if self.top_p != 1 or self.top_k != 0 or self.min_p != 0:
            raise ValueError(
                "top_p, top_k and min_p must stay 1, 0 and 0 for training rollouts, because the trainer cannot reproduce "
                f"a truncated distribution, got {self.top_p}, {self.top_k} and {self.min_p}; use temperature"
            )
        if self.dynamic_sampling and self.async_steps:
            raise ValueError(
                "dynamic_sampling needs the rewards before it goes on, so async_steps must be 0, "
                f"got {self.async_steps}"
            )
        if self.in_flight and not self.async_steps:
            raise ValueError("in_flight changes weights under what is drawn ahead: it needs async_steps above 0, got 0")
        if self.recompute_kv and not self.in_flight:
            raise ValueError(
                "recompute_kv says what in_flight does with answers that are under way: it needs in_flight"
            )
        if self.async_steps and (self.engine, self.vllm.mode) != ("vllm", "server"):
            raise ValueError(
                f"async_steps {self.async_steps} needs engine 'vllm' and vllm.mode 'server': any other engine works on the "
                f"trainer's own device, got {self.engine!r} and {self.vllm.mode!r}"
            )
        return self


class EngineConfig(Section):
    """How parameters are updated."""

    kind: Literal["local", "deepspeed"] = "local"
    """local: one process; deepspeed: ZeRO over all processes that torchrun or the deepspeed launcher starts."""
    zero_stage: int = Field(3, ge=1, le=3)
    """What deepspeed cuts over the processes. 1: optimizer state; 2: gradients too; 3: weights too."""
    offload: bool = False
    """deepspeed: keep fp32 masters, AdamW's moments and gradients in host memory, and update there."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """deepspeed: type in which gradients are summed over processes; bf16 halves the traffic and rounds every sum."""
    sequence_parallel: int = Field(1, ge=1, le=1024)
    """deepspeed: processes that share each packed row, a part of its tokens each, for sequences that one GPU cannot hold."""

    @model_validator(mode="after")
    def _check(self) -> EngineConfig:
        if self.sequence_parallel > 1 and self.kind != "deepspeed":
            raise ValueError(
                f"sequence_parallel shares rows among the processes of kind deepspeed, got {self.sequence_parallel} and "
                f"kind {self.kind}"
            )
        return self


class EvalConfig(Section):
    """Evaluation at the start, after the warm-up, on a schedule and at the end."""

    at_start: bool = True
    """Evaluate before the first step; without it the results show no change."""
    after_warmup: bool = False
    """Evaluate after the warm-up as at the start and the end: what imitation alone has brought."""
    every: int = Field(20, ge=0)
    """Steps between evaluations of `schedule_splits` during training; 0: only at the start and the end."""
    splits: list[str] | None = None
    """Splits of whole evaluations, at the start, after the warm-up and at the end; default: all that the task has."""
    schedule_splits: list[str] = ["val"]
    """Splits evaluated on the schedule."""
    num_samples: Rows = 8
    """Sampled answers per prompt; sampled success is their mean, pass@k is taken with k = num_samples."""
    temperature: Temperature = 1.0
    """Temperature of the sampled answers."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus of the sampled answers."""
    max_prompts: int | None = Field(None, ge=1)
    """Upper bound on the prompts per split; default: all of them."""
    schedule_max_prompts: int | None = Field(128, ge=1)
    """The same for the scheduled evaluations."""
    schedule_num_samples: Rows = 4
    """Sampled answers per prompt in the scheduled evaluations."""


TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")


class LogConfig(Section):
    """What a run writes besides metrics.jsonl."""

    to: list[Literal[TRACKERS]] = ["tensorboard"]
    """Trackers that are told of steps, evaluations, kept completions, settings and the report: tensorboard (files under `tb/`),
    wandb, trackio, mlflow; where these keep a run, their own environment variables say."""
    project: str = Field("amft-fast", min_length=1)
    """The project of wandb and trackio, mlflow's experiment; the run is called after its folder."""
    samples_every: int = Field(20, ge=0)
    """Steps between the completions kept in samples.jsonl; 0: none."""
    samples: int = Field(8, ge=1)
    """Completions kept each time."""
    implicit_reward: bool = False
    """Log the mean path-level log pi/pi_ref of demonstrations and rollouts against the policy after the warm-up (two forward
    passes more a step)."""
    progress: bool | None = None
    """Show progress bars; default: only on a terminal, plain lines otherwise."""
    every: int = Field(10, ge=1)
    """Steps between plain progress lines."""

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_runs(cls, values: Any) -> Any:
        """Their config.toml says log.tensorboard, which `to` has taken the place of."""
        if isinstance(values, dict) and isinstance(values.get("tensorboard"), bool):
            on = values["tensorboard"]
            values = {"to": ["tensorboard"] if on else []} | {k: v for k, v in values.items() if k != "tensorboard"}
        return values


class ProfileConfig(Section):
    """Where the time and memory of a few steps went (profiling.py)."""

    steps: int = Field(0, ge=0)
    """Steps to profile; the report is printed and the traces are written to `profile/` in the run's folder."""
    skip: int = Field(2, ge=0)
    """Steps before the first profiled one."""
    rollouts: bool = False
    """Record the operations of rollouts too: several megabytes for each token that is decoded."""


class CheckpointConfig(Section):
    """What is saved, and what is kept."""

    every: int = Field(50, ge=0)
    """Steps between checkpoints; 0: only at the end and on a signal."""
    background: bool = True
    """Write them beside the steps, which wait for a copy to host memory alone: of masters, moments and utility gradient, 12 to
    20 bytes for each parameter of a process. false: the steps wait for the disk."""
    keep_last: int = Field(2, ge=1)
    """How many of the newest are kept."""
    keep_best: bool = True
    """Keep the checkpoint with the best `metric` as well, in `checkpoints/best`."""
    metric: str = "val/sampled"
    """Evaluation figure that decides: split/greedy, split/sampled or split/pass_at_k. Higher is better."""
    export: bool = True
    """At the end write the policy as a plain transformers folder under `model/`."""


class Config(Section):
    """The whole configuration of a run."""

    run: RunConfig = Field(default_factory=RunConfig)
    task: TaskConfig = Field(default_factory=TaskConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    advantage: AdvantageConfig = Field(default_factory=AdvantageConfig)
    mixture: MixtureConfig = Field(default_factory=MixtureConfig)
    controller: ControllerConfig = Field(default_factory=ControllerConfig)
    meta: MetaConfig = Field(default_factory=MetaConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    profile: ProfileConfig = Field(default_factory=ProfileConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)

    @model_validator(mode="after")
    def _check(self) -> Config:
        c = self.controller
        learned = METHODS[self.train.method].learned
        if learned and not self.in_blocks and not c.mu_min <= c.mu_init <= c.mu_max:
            raise ValueError(
                f"controller.mu_init must lie in [mu_min, mu_max] = [{c.mu_min}, {c.mu_max}], got {c.mu_init}"
            )
        if self.advantage.kind in GROUP_KINDS and self.rollout.num_generations < 2:
            raise ValueError(
                f"rollout.num_generations must be at least 2 for advantage.kind {self.advantage.kind!r}, whose baseline is "
                f"the rest of the group, got {self.rollout.num_generations}; reinforce++ and gae work with 1"
            )
        self._check_loss()
        self._check_mixture()
        self._check_shared_rows()
        self._check_adapter()
        if self.rollout.engine == "vllm" and self.objective.tis_cap is None and ":" not in self.objective.loss:
            self.objective = self.objective.model_copy(update={"tis_cap": 2.0})
        split = self.checkpoint.metric.partition("/")[0]
        if self.checkpoint.keep_best and self.eval.every and split not in self.eval.schedule_splits:
            raise ValueError(
                f"checkpoint.metric must name a split that is evaluated on the schedule {self.eval.schedule_splits}, "
                f"got {self.checkpoint.metric!r}"
            )
        return self

    @property
    def prompts_of_a_look(self) -> int:
        """Held-out prompts that a μ learned in blocks is judged by."""
        return self.controller.look_prompts or min(64, max(32, 2 * self.train.prompts_per_step))

    @property
    def demos_of_a_look(self) -> int:
        """Held-out demonstrations whose likelihood a μ learned in blocks is judged by."""
        return self.controller.look_demos or min(256, max(32, 8 * self.train.prompts_per_step))

    @property
    def in_blocks(self) -> bool:
        """Whether mu is learned by blocks of imitation (controller/blocks.py)."""
        return METHODS[self.train.method].learns_from_utility and self.controller.signal in ("blocks", "lot")

    @property
    def takes_utility(self) -> bool:
        """Whether mu is learned from dot-products with the utility gradient (controller/windows.py)."""
        return METHODS[self.train.method].learns_from_utility and not self.in_blocks

    @property
    def sends_adapter(self) -> bool:
        """Whether rollout engines are given the adapter alone."""
        return self.rollout.engine == "vllm" and self.rollout.vllm.adapter_only

    @property
    def off_policy(self) -> bool:
        """Whether the policy may have moved since its rollouts were drawn, so that ratios differ from 1."""
        return self.train.minibatches_per_rollout > 1 or self.rollout.async_steps > 0

    def _check_adapter(self) -> None:
        if not self.sends_adapter:
            return
        if not self.model.lora.rank:
            raise ValueError("rollout.vllm.adapter_only sends an adapter: it needs model.lora.rank above 0, got 0")
        if self.rollout.in_flight:
            raise ValueError(
                "rollout.in_flight changes whole weights under answers that are under way: leave rollout.vllm.adapter_only off"
            )

    def _check_shared_rows(self) -> None:
        if self.engine.sequence_parallel == 1:
            return
        if self.train.packing is False or self.model.attention in ("sdpa", "eager"):
            raise ValueError(
                "engine.sequence_parallel shares packed rows: it needs train.packing and model.attention auto or one of "
                f"flash_attention, got train.packing {str(self.train.packing).lower()} and model.attention "
                f"{self.model.attention}"
            )

    def _check_loss(self) -> None:
        o = self.objective
        if o.loss == "kl_cov" and not self.off_policy:
            raise ValueError(
                "objective.loss kl_cov holds back how far tokens have moved: it needs train.minibatches_per_rollout "
                "above 1, got 1"
            )
        if o.loss == "dro" and self.off_policy and not o.ratio_penalty:
            raise ValueError(
                "objective.loss dro needs objective.ratio_penalty above 0, which alone keeps the policy near, got 0"
            )
        if o.max_staleness is not None and o.max_staleness >= self.rollout.async_steps:
            raise ValueError(
                "objective.max_staleness must be below rollout.async_steps, or there is nothing to leave out, got "
                f"{o.max_staleness} and {self.rollout.async_steps}"
            )
        if self.advantage.overlong_buffer >= self.rollout.max_new_tokens:
            raise ValueError(
                f"advantage.overlong_buffer must be below rollout.max_new_tokens, got {self.advantage.overlong_buffer} and "
                f"{self.rollout.max_new_tokens}"
            )
        if o.correction == "mis" and o.tis_cap == 0:
            raise ValueError("objective.correction mis needs objective.tis_cap above 0, got 0")
        if ":" in o.loss and o.corrects:
            raise ValueError(
                "objective.loss of one's own is given the sampler's log-probs: leave objective.tis_cap and correction alone"
            )
        if (o.whole or ":" in o.loss) and o.ratio_penalty:
            raise ValueError(
                f"objective.ratio_penalty goes with {', '.join(TOKEN_LOSSES)}, got objective.loss {o.loss!r}"
            )

    def _check_mixture(self) -> None:
        method = METHODS[self.train.method]
        if not method.mixture:
            return
        if self.advantage.kind == "gae":
            raise ValueError(
                f"train.method {method.name!r} compares answers to one prompt: advantage.kind must not be gae"
            )
        if self.rollout.dynamic_sampling and method.mixture in ("luffy", "srft", "hpt", "superrl", "relift"):
            raise ValueError(
                "rollout.dynamic_sampling replaces the prompts that no answer solves, from which train.method "
                f"{method.name!r} learns by "
                "imitation: leave it off"
            )
        if method.mixture in ("luffy", "srft") and self.rollout.num_generations < 2:
            raise ValueError(
                f"rollout.num_generations must be at least 2 for train.method {method.name!r}, whose group is all but "
                "one rollouts "
                f"and a demonstration, got {self.rollout.num_generations}"
            )
