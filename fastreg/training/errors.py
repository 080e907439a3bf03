"""The two ways a run ends early: what it was asked for is wrong, or the training itself went wrong."""


class InputError(ValueError):
    """Something the user can put right: an option, a file, a run folder. The message is one line."""


class DivergedError(RuntimeError):
    """The training loss stopped being a finite number."""
