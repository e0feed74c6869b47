"""What `train CONFIG --dry-run` looks at beyond the settings: whether the model and a task's data are where they
say, and trackers installed.

Nothing is downloaded. What lies on the hub is asked for by name; when the hub cannot be reached, a sentence says so, and what
could not be checked, and the dry run is no failure for that.
"""

from __future__ import annotations

from pathlib import Path

from amft_fast.config import Config
from amft_fast.errors import UserError
from amft_fast.run import trackers
from amft_fast.tasks import shipped

SECONDS = 5.0


def check(cfg: Config) -> list[str]:
    """One line for each thing looked at. Raises UserError for what is wrong and can be told without the hub."""
    trackers.check(cfg)
    lines, hub = [], Hub()
    if cfg.model.path:
        lines.append(_model(cfg.model.path, hub))
    return lines + shipped.dry_run(cfg.task, hub) + hub.lines()


class Hub:
    """Asks the Hugging Face hub whether it has something; after a first failure to reach it, no more."""

    def __init__(self) -> None:
        self.unreachable = ""
        self.unchecked: list[str] = []

    def has(self, kind: str, name: str) -> bool | None:
        """True or False; None when the hub cannot be reached."""
        if not self.unreachable:
            try:
                return self._ask(kind, name)
            except Exception as e:  # no connection has many names, by the layer that notices it
                text = str(e).strip().splitlines()
                self.unreachable = f"{type(e).__name__}: {text[0] if text else ''}"[:200]
        self.unchecked.append(f"{kind} {name}")
        return None

    def _ask(self, kind: str, name: str) -> bool:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        try:
            ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
            ask(name, timeout=SECONDS)
        except GatedRepoError:
            return True
        except RepositoryNotFoundError:
            return False
        return True

    def look_up(self, kind: str, name: str) -> str:
        """A line that says whether the hub has it. Raises UserError when it has not."""
        found = self.has(kind, name)
        if found is False:
            raise UserError(
                f"{kind} {name!r} is no file or folder here, and the Hugging Face hub has none of this name"
            )
        return f"{kind}: {name}, {'on the hub' if found else 'not checked'}"

    def lines(self) -> list[str]:
        if not self.unreachable:
            return []
        return [
            f"the Hugging Face hub cannot be reached from here ({self.unreachable}), so these were not checked: "
            f"{', '.join(self.unchecked)}. They will be needed to train: give folders and files instead, or a machine with the "
            "hub (or its cache, HF_HOME)"
        ]


def _model(path: str, hub: Hub) -> str:
    if (Path(path).expanduser() / "config.json").is_file():
        return f"model: {path} is there"
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"model.path: {path!r} is not a transformers checkpoint: it has no config.json")
    return hub.look_up("model", path)
