"""Other scorers of mathematical answers, as (response, gold) -> bool: math-verify, and those of verl and lm-eval.

The last two are single files of large packages. They are loaded from where they are installed without their packages, so that
`pip install --no-deps verl lm-eval` is enough.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable
from types import ModuleType

Scorer = Callable[[str, str], bool]


def peers() -> tuple[dict[str, Scorer], dict[str, str]]:
    """(the scorers by name, why others are not there)"""
    found: dict[str, Scorer] = {}
    missing: dict[str, str] = {}
    for name, make in _PEERS.items():
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                scorer = make()
        except (ImportError, importlib.metadata.PackageNotFoundError, OSError) as e:
            missing[name] = str(e).splitlines()[0][:120]
        else:
            found[name] = _guarded(scorer)
    return found, missing


def _guarded(scorer: Scorer) -> Scorer:
    """What a scorer raises or prints is a no and nothing else, as in the trainers that call it."""

    def judged(response: str, gold: str) -> bool:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return bool(scorer(response, gold))
            except Exception:
                return False

    return judged


def _math_verify() -> Scorer:
    from math_verify import parse, verify

    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return lambda response, gold: verify(parse(gold if "$" in gold else f"${gold}$"), parse(response))


def _file(package: str, path: str) -> ModuleType:
    """A module of an installed package, loaded alone."""
    place = importlib.metadata.distribution(package).locate_file(path)
    spec = importlib.util.spec_from_file_location(f"peer_{path.replace('/', '_').removesuffix('.py')}", str(place))
    if spec is None or spec.loader is None:
        raise ImportError(f"{package} has no {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _verl_math() -> Scorer:
    module = _file("verl", "verl/utils/reward_score/math_reward.py")
    return lambda response, gold: module.compute_score(response, gold) == 1.0


def _verl_dapo() -> Scorer:
    module = _file("verl", "verl/utils/reward_score/math_dapo.py")
    return lambda response, gold: module.verify(response, gold, strict_box_verify=True)[0]


def _stated(module: ModuleType, response: str) -> str:
    """The answer as lm-eval looks for it: in the last box, else between the first dollar and the last."""
    boxed = module.last_boxed_only_string(response)
    if boxed is not None:
        return module.remove_boxed(boxed)
    dollars = [i for i, c in enumerate(response) if c == "$"]
    return response[dollars[0] + 1 : dollars[-1]] if len(dollars) > 1 else response


def _lm_eval_hendrycks() -> Scorer:
    module = _file("lm-eval", "lm_eval/tasks/hendrycks_math/utils.py")
    return lambda response, gold: module.is_equiv(_stated(module, response), gold)


def _lm_eval_minerva() -> Scorer:
    module = _file("lm-eval", "lm_eval/tasks/minerva_math/utils.py")

    def judged(response: str, gold: str) -> bool:
        answer = module.normalize_final_answer(_stated(module, response))
        return module.is_equiv(answer, module.normalize_final_answer(gold))

    return judged


_PEERS: dict[str, Callable[[], Scorer]] = {
    "math-verify": _math_verify,
    "verl, math_reward": _verl_math,
    "verl, math_dapo": _verl_dapo,
    "lm-eval, hendrycks_math": _lm_eval_hendrycks,
    "lm-eval, minerva_math": _lm_eval_minerva,
}
