"""Compile every Triton kernel configuration for GPUs that are not here: `python -m bench.compile_gate [--all] [--json FILE]`.

`triton.compile` needs no GPU, and the `cuobjdump` of the Triton wheel reads registers, shared memory and spills from the
cubin. A configuration fails if it spills, if it does not fit a multiprocessor, or if its widest global access is under
128 bits. Without `--all` the argument variants are the two extremes, every optional argument and none, with a vocabulary
that is no multiple of 16 (the harder case); fp16 compiles as bf16 does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTER_FILE = 65536
BLOCKS = (1024, 2048, 4096)

_POINTERS = {"targets_ptr": "*i64", "arrived_ptr": "*i32"}
_INTEGERS = {
    *("first_row", "first_col", "V", "N", "H", "split_columns"),
    *("row_stride", "grad_stride", "hidden_stride", "weight_stride"),
}
_OPTIONAL = {
    *(
        "bias_ptr",
        "temperature_ptr",
        "softcap",
        "shaped_weight_ptr",
        "is_low",
        "is_high",
        "pg_weight_ptr",
        "entropy_weight_ptr",
        "advantages_ptr",
        "old_ptr",
    ),
    *("behavior_ptr", "ref_ptr", "dual_clip", "tis_cap", "entropy_grad_ptr"),
}
# What the launches keep at multiples of 16; per-token vectors are never specialised.
_ALIGNED = (
    *("logits_ptr", "grad_ptr", "row_stride", "grad_stride"),
    *("hidden_ptr", "weight_ptr", "hidden_stride", "weight_stride", "split_columns", "H"),
)

PLAIN = (("FORM", 0), ("KL", 2), ("SHAPE", 0))  # grpo, k3, LUFFY's shaping


@dataclass(frozen=True)
class Case:
    """One kernel, one set of constants, one variant of its arguments, one architecture."""

    kernel: str
    constants: tuple[tuple[str, int], ...]
    warps: int
    stages: int
    dtype: str
    options: str  # "all" or "none" of the optional arguments
    aligned_vocab: bool
    architecture: int


@dataclass(frozen=True)
class Report:
    case: Case
    registers: int
    shared_bytes: int
    spill_bytes: int
    load_bits: int
    store_bits: int
    faults: tuple[str, ...]


def cases(everything: bool) -> Iterator[Case]:
    """The launch rules, spelled out."""
    from amft_kernels.fused_logprob_triton import fused_config
    from amft_kernels.loss_forms import FORMS, KL_KINDS, SHAPES
    from amft_kernels.rows_launch import parts_config, row_config

    dtypes = ("bf16", "fp16", "fp32") if everything else ("bf16", "fp32")
    alignments = (False, True) if everything else (False,)
    for cc, options, aligned in itertools.product(ARCHITECTURES, ("all", "none"), alignments):
        for block in BLOCKS:
            config = row_config(block)
            assert config["BLOCK"] == block
            constants = (("BLOCK", block),)
            for dtype in dtypes:
                yield Case("slab_grad_kernel", constants, config["num_warps"], 3, dtype, options, aligned, cc)
                yield Case(
                    "policy_rows_kernel", (*constants, *PLAIN), config["num_warps"], 3, dtype, options, aligned, cc
                )
            yield Case("logprob_rows_kernel", constants, config["num_warps"], 3, "bf16", options, aligned, cc)
        for vocab, dtype in itertools.product((8192, 151_936), dtypes):
            config = parts_config(vocab)
            warps = config.pop("num_warps")
            yield Case("policy_parts_kernel", (*config.items(), *PLAIN), warps, 3, dtype, options, aligned, cc)
        # What a row does with its one log-prob is the same at any length: the other forms at one.
        variants = itertools.product(range(len(FORMS) - 1), range(len(KL_KINDS)), range(len(SHAPES)))
        for variant in variants if everything else zip(range(1, 5), (0, 1, 2, 1), (1, 0, 1, 0)):
            form = tuple(zip(("FORM", "KL", "SHAPE"), variant))
            for kernel, config in (
                ("policy_rows_kernel", row_config(BLOCKS[-1])),
                ("policy_parts_kernel", parts_config(151_936)),
            ):
                warps = config.pop("num_warps")
                if options == "all":
                    yield Case(kernel, (*config.items(), *form), warps, 3, "bf16", options, aligned, cc)
        config = fused_config(cc)
        warps, stages = config.pop("num_warps"), config.pop("num_stages")
        for dtype in dtypes[:-1]:  # the fused kernel is for 16-bit operands
            yield Case("fused_stats_kernel", tuple(config.items()), warps, stages, dtype, options, aligned, cc)


def compile_case(case: Case) -> Report:
    """Compile one case and read what the compiler made of it."""
    import triton
    from amft_kernels import fused_logprob_triton, rows_triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(rows_triton, case.kernel, None) or getattr(fused_logprob_triton, case.kernel)
    signature, constants = {}, {}
    for name in kernel.arg_names:
        if name in dict(case.constants):
            signature[name], constants[name] = "constexpr", dict(case.constants)[name]
        elif case.options == "none" and name in _OPTIONAL:
            signature[name], constants[name] = "constexpr", None
        else:
            signature[name] = _type_of(name, case.dtype)
    aligned = (*_ALIGNED, "V") if case.aligned_vocab else _ALIGNED
    places = {name: (position,) for position, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={places[name]: value for name, value in constants.items()},
        attrs={places[n]: [["tt.divisibility", 16]] for n in aligned if n in places and n not in constants},
    )
    options = {"num_warps": case.warps, "num_stages": case.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", case.architecture, 32), options=options)
    registers, spill = _resources(compiled.asm["cubin"])
    loads, stores = _access_bits(compiled.asm["ptx"])
    shared = compiled.metadata.shared
    return Report(case, registers, shared, spill, loads, stores, _faults(case, registers, shared, spill, loads, stores))


def _faults(case: Case, registers: int, shared: int, spill: int, loads: int, stores: int) -> tuple[str, ...]:
    writes_rows = "grad" in case.kernel or "policy" in case.kernel
    return tuple(
        words
        for wrong, words in (
            (spill > 0, f"spills {spill} bytes"),
            (shared > SHARED_LIMIT[case.architecture], f"needs {shared} bytes of shared memory"),
            (registers * case.warps * 32 > REGISTER_FILE, f"needs {registers} registers on {case.warps} warps"),
            (loads < 128, f"loads {loads} bits at most"),
            (writes_rows and stores < 128, f"stores {stores} bits at most"),
        )
        if wrong
    )


def _type_of(name: str, dtype: str) -> str:
    if name in _INTEGERS:
        return "i32"
    if name in ("grad_ptr", "bias_ptr", "hidden_ptr", "weight_ptr"):
        return f"*{dtype}"
    return _POINTERS.get(name, "*fp32" if name.endswith("_ptr") else "fp32")


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory: what is there is spilled."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{word}:(\d+)", printed)[1]) for word in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def _access_bits(ptx: str) -> tuple[int, int]:
    """The widest global load (or asynchronous copy) and store."""

    def widest(instruction: str) -> list[int]:
        found = re.findall(rf"{instruction}\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)", ptx)
        return [int(count or 1) * int(bits) for count, bits in found]

    copies = [8 * int(size, 0) for size in re.findall(r"cp\.async\.c\w\.shared\.global[^;]*?\], (0x\w+|\d+)", ptx)]
    return max(widest("ld") + copies, default=0), max(widest("st"), default=0)


def table(reports: Sequence[Report]) -> str:
    """Markdown: one line per kernel, constants, type and options, with the architectures side by side."""
    head = "| kernel | columns × warps | type | options | V % 16 | registers | shared KiB | spill | load / store bits |"
    lines = [head, "|" + " --- |" * 9]
    groups: dict[tuple, list[Report]] = {}
    for report in reports:
        c = report.case
        block = "×".join(str(value) for _, value in c.constants)
        key = (c.kernel, f"{block} × {c.warps}", c.dtype, c.options, "0" if c.aligned_vocab else "≠ 0")
        groups.setdefault(key, []).append(report)
    for key, group in groups.items():
        columns = (
            " / ".join(str(r.registers) for r in group),
            " / ".join(f"{r.shared_bytes / 1024:.0f}" for r in group),
            " / ".join(str(r.spill_bytes) for r in group),
            f"{min(r.load_bits for r in group)} / {min(r.store_bits for r in group)}",
        )
        lines.append("| " + " | ".join((*key, *columns)) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compile_gate", description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="every type and alignment as well")
    parser.add_argument("--json", type=Path, help="write the reports here")
    arguments = parser.parse_args(argv)
    # Triton 3.9 warns that the default will change; every version up to it fuses.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        reports = list(pool.map(compile_case, cases(arguments.all), chunksize=8))
    print(table(reports))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(report) for report in reports], indent=1))
    faulty = [report for report in reports if report.faults]
    for report in faulty:
        print(f"FAULT sm_{report.case.architecture} {report.case}: {'; '.join(report.faults)}", file=sys.stderr)
    architectures = " / ".join(f"sm_{cc}" for cc in ARCHITECTURES)
    print(f"\n{len(reports)} configurations for {architectures}, {len(faulty)} faulty")
    return 1 if faulty else 0


if __name__ == "__main__":
    raise SystemExit(main())
