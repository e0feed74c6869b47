"""What is raised across the house. Imports nothing."""


class UserError(Exception):
    """A mistake of the user's. Its text is one sentence that says what was wrong and what to do; shown without traceback."""


class RolloutFailure(RuntimeError):
    """A rollout engine that could not be brought back. Its text is one sentence; the run saves its state and stops with it."""
