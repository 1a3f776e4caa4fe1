"""The one error that users meet as a sentence."""

from __future__ import annotations


class UserError(ValueError):
    """Something that the user can mend: a wrong flag, a path that is not there, a file that is damaged.

    Its message is one sentence that says what is wrong and what to do. The commands print that sentence alone.
    Every other exception is a fault of the program and keeps its traceback.
    """
