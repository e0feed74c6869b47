"""No function of the training step asks the device for a value: a lint, since only a GPU would feel it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# File: functions that a step runs between its first micro-batch and its last kernel.
STEP = {
    "amft_fast/model/policy.py": [
        *(f"Policy.{name}" for name in ["hidden_rows", "_seeing", "forward", "logprobs"]),
        "_statistics",
    ],
    "amft_fast/model/vision.py": ["Vision.arguments", "Vision.readable", "_to"],
    "amft_fast/model/attention.py": ["attention", "_packed", "segments", "_padded", "_rows", "_windowed", "inputs"],
    "amft_fast/model/ulysses.py": ["Ulysses.attend", "_on_whole_row"],
    "amft_fast/data/batch.py": ["Batch.to"],
    "amft_fast/engine/local.py": ["*"],
    "amft_fast/engine/flat.py": [
        f"FlatEngine.{name}"
        for name in [
            "zero_grad",
            "take_gradient",
            "end_sweep",
            "probe",
            "_adam_state",
            "_norm",
            "_clip",
            "step",
            "all_reduce",
            "_mine",
            "_joined",
        ]
    ],
    "amft_fast/trainer.py": ["Trainer.update", "Trainer.sweep"],
    "kernels/gradients.py": ["*"],
    "kernels/matmul.py": ["*"],
    "kernels/policy_terms.py": ["*"],
}
WAITING = {"item", "cpu", "tolist", "numpy", "nonzero", "synchronize", "wait_stream_on_host"}
ALLOWED = {"load_state_dict", "state_dict", "export", "plain_copy"}
ON_A_CPU_ALONE = {"_Attached.backward", "_scaled"}  # they ask for the device first


def functions(tree):
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    yield f"{node.name}.{inner.name}", inner


def waits(function):
    """Calls that read a tensor back, by method name, and bool/float/int of something that is computed from tensors; and tensors
    made of Python's numbers on a device, whose copy waits where it is not from pinned memory."""
    for node in ast.walk(function):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Attribute) and node.func.attr in WAITING:
            yield node.lineno, node.func.attr
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("tensor", "as_tensor"):
            yield from ((node.lineno, node.func.attr) for k in node.keywords if k.arg == "device")
        named = node.func.id if isinstance(node.func, ast.Name) else ""
        if named in ("bool", "float", "int") and node.args and isinstance(node.args[0], ast.Call):
            yield node.lineno, named


@pytest.mark.parametrize("path", STEP)
def test_the_step_never_waits_for_the_device(path):
    wanted = STEP[path]
    found = {n: f for n, f in functions(ast.parse((ROOT / path).read_text())) if "*" in wanted or n in wanted}
    assert "*" in wanted or set(found) == set(wanted)
    bad = {
        n: list(waits(f)) for n, f in found.items() if n.rpartition(".")[2] not in ALLOWED and n not in ON_A_CPU_ALONE
    }
    assert not {n: b for n, b in bad.items() if b}


def test_the_lint_sees_what_it_should():
    tree = ast.parse(
        "def f(x):\n    if bool(x.any()):\n        return x.sum().item()\n"
        "    return float(len(x)) * torch.tensor([1], device=x.device)"
    )
    assert sorted(name for _, name in waits(tree.body[0])) == ["bool", "float", "item", "tensor"]
