"""What `loss_head.py` measured as JSON entries, Markdown tables, bars (the goals, met or not) and one PNG."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.results import markdown_table, mib
from bench.workload import Case

TITLES = {
    "gemms": "The floor: bare matrix products",
    "policy": "Clipped policy gradient and entropy, both with gradient",
    "pg": "Clipped policy gradient without the entropy term",
    "ce": "Cross-entropy alone",
}
HEADER = (
    "",
    "ms",
    "TFLOP/s",
    "× GEMMs over chunks",
    "× GEMMs whole",
    "share of GEMM rate",
    "peak extra memory",
    "error of loss",
    "of dH",
    "of dW",
)


# --------------------------------------------------------------------------------------------------------------- JSON


def shape_entry(case: Case, candidates: list, sweep: bool) -> dict[str, object]:
    """All that was found about one shape."""
    n, h, v = case.shape
    floors = {c.chunk_bytes: statistics.median(c.times_ms) for c in candidates if c.role == "floor" and c.times_ms}
    rows = [_row(c, case, floors) for c in candidates if not c.left_out]
    left_out = [{"kind": c.kind, "role": c.role, "name": c.name, "why": c.left_out} for c in candidates if c.left_out]
    inherent = case.hidden.element_size() * n * h + 4 * v * h
    return {
        "shape": [n, h, v],
        "sweep": sweep,
        "flop": 6 * n * h * v,
        "gradient_bytes": inherent,
        "rows": rows,
        "left_out": left_out,
    }


def _row(c, case: Case, floors: dict[int | None, float]) -> dict[str, object]:
    n, h, v = case.shape
    row = {"kind": c.kind, "role": c.role, "name": c.name, "backend": c.backend, "chunk_bytes": c.chunk_bytes}
    row |= {"green": c.green, "errors": c.errors, "limits": c.limits, "peak_extra_bytes": c.peak_extra_bytes}
    if c.times_ms:
        median = statistics.median(c.times_ms)
        # A peer has no chunk_bytes of ours: the first is the default.
        chunked = floors.get(c.chunk_bytes or next((size for size in floors if size), None))
        whole = floors.get(None)
        row |= {
            "median_ms": median,
            "best_ms": min(c.times_ms),
            "tflops": 6 * n * h * v / median / 1e9,
            "over_chunked_gemms": chunked and median / chunked,
            "over_whole_gemms": whole and median / whole,
            "share_of_gemm_rate": chunked and chunked / median,
            "times_ms": c.times_ms,
        }
    return row


# --------------------------------------------------------------------------------------------------------------- bars


def bars(result: dict) -> list[dict[str, object]]:
    """The goals that this run can judge, with what was found."""
    judge = _gpu_bars if result["device_type"] == "cuda" else _cpu_bars
    return [
        {"shape": entry["shape"], "text": text, "value": value, "bar": bar, "met": value <= bar}
        for entry in result["shapes"]
        if not entry["sweep"]
        for text, value, bar in judge(entry)
    ]


def _timed(entry: dict, kind: str, role: str, test: Callable[[dict], bool] = lambda row: True) -> list[dict]:
    rows = (r for r in entry["rows"] if r["kind"] == kind and r["role"] == role and "median_ms" in r)
    return sorted((r for r in rows if test(r)), key=lambda r: r["median_ms"])


def _cpu_bars(entry: dict) -> Iterator[tuple[str, float, float]]:
    own = _timed(entry, "policy", "ours", lambda r: r["name"] == "linear_policy_loss")
    eager = _timed(entry, "policy", "peer", lambda r: r["name"].startswith("eager"))
    if own and eager and entry["shape"] == [2048, 512, 32768]:
        yield "time over eager's", own[0]["median_ms"] / eager[0]["median_ms"], 1 / 1.3
        yield "peak extra memory over eager's", own[0]["peak_extra_bytes"] / eager[0]["peak_extra_bytes"], 1 / 8


def _gpu_bars(entry: dict) -> Iterator[tuple[str, float, float]]:
    if entry["shape"][1] < 3584:
        return
    for size, bar in ((1 << 30, 1.2), (2 << 30, 1.15)):
        own = _timed(entry, "policy", "ours", lambda r, size=size: r["chunk_bytes"] == size)
        if own and own[0]["over_whole_gemms"]:
            yield f"time over the whole GEMMs', {mib(size)}", own[0]["over_whole_gemms"], bar
    for kind, words, bar in (("policy", "with entropy", 1.0), ("ce", "CE-only", 1.05)):
        own, peers = _timed(entry, kind, "ours"), _timed(entry, kind, "peer")
        if own and peers:
            yield f"time over the best {words} peer's", own[0]["median_ms"] / peers[0]["median_ms"], bar


# ----------------------------------------------------------------------------------------------------------- Markdown


def label(row: dict, sizes: int) -> str:
    """Name, backend, and the workspace where there are several."""
    parts = [row["name"], row["backend"]]
    if row["chunk_bytes"] and sizes > 1:
        parts.append(mib(row["chunk_bytes"]))
    return ", ".join(part for part in parts if part)


def markdown(result: dict) -> str:
    """The whole document; shapes of the sweeps get one table together."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items() if number)
    threads = f", {result['threads']} threads" if result["device_type"] == "cpu" else ""
    lines = [
        "# Loss head, forward and backward",
        "",
        f"{result['device']}{threads}, {result['dtype']}, chunk_bytes {' and '.join(map(mib, result['chunk_bytes']))}; "
        f"{versions}; commit {result['commit'][:12]}, {result['time']}.",
        f"Median of {result['rounds']} rounds in turns ({result['timing']}). Memory, gradients included: {result['memory']}.",
        "Errors are against fp64: the loss, and rows of dH and dW relative to their norm.",
    ]
    if result["device_type"] == "cpu" and any(version in result["versions"] for version in ("liger-kernel", "trl")):
        lines.append("What Liger and TRL run on a CPU are their own fall-backs in torch.")
    for entry in result["shapes"]:
        if not entry["sweep"]:
            lines += ["", "## N = {:,}, H = {:,}, V = {:,}".format(*entry["shape"])]
            lines += _shape_tables(entry, len(result["chunk_bytes"]))
    lines += _sweep_table(result) + _bar_lines(result) + _left_out_lines(result)
    return "\n".join(lines) + "\n"


def _shape_tables(entry: dict, sizes: int) -> list[str]:
    lines = []
    for kind, title in TITLES.items():
        rows = [row for row in entry["rows"] if row["kind"] == kind]
        rows.sort(key=lambda row: row.get("median_ms", float("inf")))
        if rows:
            header = (title, *HEADER[1:])
            lines += ["", markdown_table(header, [(label(row, sizes), *_cells(row)) for row in rows])]
    return lines


def _cells(row: dict) -> Iterator[str]:
    if "median_ms" in row:
        yield f"{row['median_ms']:,.1f}"
        yield f"{row['tflops']:.3g}"
        yield from (f"{row[key]:.2f}" if row[key] else "–" for key in ("over_chunked_gemms", "over_whole_gemms"))
        yield f"{100 * row['share_of_gemm_rate']:.0f} %" if row["share_of_gemm_rate"] else "–"
    else:
        yield "red: not timed"
        yield from ("–",) * 4
    yield mib(row["peak_extra_bytes"])
    for name in ("loss", "hidden", "weight"):
        yield f"{row['errors'][name]:.0e}" if row["errors"] else "–"


def _sweep_table(result: dict) -> list[str]:
    sizes = len(result["chunk_bytes"])
    found = [
        ("{:,} × {:,} × {:,}, {}: {}".format(*entry["shape"], row["kind"], label(row, sizes)), *_cells(row))
        for entry in result["shapes"]
        for row in entry["rows"]
        if entry["sweep"] and row["kind"] != "gemms"
    ]
    return ["", "## Sweeps over N and V", "", markdown_table(("N × H × V", *HEADER[1:]), found)] if found else []


def _bar_lines(result: dict) -> list[str]:
    lines = [
        "- {} × {} × {}: {} {:.2f}, to be at most {:.2f}: {}".format(
            *bar["shape"], bar["text"], bar["value"], bar["bar"], "met" if bar["met"] else "**not met**"
        )
        for bar in result["bars"]
    ]
    return ["", "## Bars", "", *lines] if lines else []


def _left_out_lines(result: dict) -> list[str]:
    reasons = defaultdict(list)
    for entry in result["shapes"]:
        for row in entry["left_out"]:
            line = f"{row['name']} ({row['kind']})"
            if line not in reasons[row["why"]]:
                reasons[row["why"]].append(line)
    lines = [f"- {', '.join(names)}: {why}" for why, names in reasons.items()] + [
        f"- {words}" for words in result["skipped"]
    ]
    return ["", "## Left out", "", *lines] if lines else []


# ---------------------------------------------------------------------------------------------------------------- PNG


def plot(result: dict, path: Path) -> bool:
    """Time and memory over N, memory over V; False when there is nothing to draw a line through, or nothing to draw with."""
    panels = [
        ("N", "median_ms", "time (ms)"),
        ("N", "peak_extra_bytes", "peak extra memory (MiB)"),
        ("V", "peak_extra_bytes", "peak extra memory (MiB)"),
    ]
    drawn = [(axis, words, lines) for axis, key, words in panels if (lines := _series(result, axis, key))]
    if not drawn:
        return False
    try:
        import matplotlib
    except ImportError:  # a GPU machine may lack it
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(drawn), figsize=(4.6 * len(drawn), 3.8), squeeze=False)
    for ax, (axis, words, (fixed, lines)) in zip(axes[0], drawn):
        for name, points in sorted(lines.items()):
            own = not name.startswith(("eager", "three"))
            xs, ys = zip(*sorted(points))
            ax.plot(
                xs, ys, marker="o", markersize=3, linewidth=1.8 if own else 1.2, ls="-" if own else "--", label=name
            )
        ax.set(xscale="log", yscale="log", xlabel=f"{axis}   ({fixed})", ylabel=words)
        ticks = sorted({x for points in lines.values() for x, _ in points})
        ax.set_xticks(ticks, [f"{x:,}" for x in ticks], fontsize=7, rotation=30)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0][0].legend(fontsize=6.5)
    figure.suptitle(f"Loss head, forward and backward: {result['device']}, {result['dtype']}", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
    return True


def _series(result: dict, axis: str, key: str) -> tuple[str, dict[str, list[tuple[int, float]]]] | None:
    """Points by line over the largest group of shapes that differ in `axis` alone, and what the others are."""
    place = {"N": 0, "V": 2}[axis]
    groups = defaultdict(list)
    for entry in result["shapes"]:
        groups[tuple(x for i, x in enumerate(entry["shape"]) if i != place)].append(entry)
    fixed, group = max(groups.items(), key=lambda item: len(item[1]), default=((), []))
    if len({entry["shape"][place] for entry in group}) < 2:
        return None
    lines = defaultdict(list)
    for entry in group:
        for row in entry["rows"]:
            if row.get(key) is not None and "median_ms" in row:
                scale = 1 if key == "median_ms" else 2**20
                name = label(row, len(result["chunk_bytes"]))
                name += f" ({row['kind']})" if row["kind"] != "gemms" else ""
                lines[name].append((entry["shape"][place], row[key] / scale))
    lines = {name: points for name, points in lines.items() if len(points) > 1}
    names = [name for i, name in enumerate("NHV") if i != place]
    return (", ".join(f"{n} = {x:,}" for n, x in zip(names, fixed)), lines) if lines else None
