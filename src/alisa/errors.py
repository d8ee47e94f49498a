"""Everything a user can cause, as one small family of exceptions.

Each message is one sentence a person can act on: what was asked (with the number), what the limit is, and the
way out. The command line prints it and exits with status 2; a traceback is kept for what only we can cause.
"""


class AlisaError(Exception):
    """Base of every error that the caller, not this library, can mend."""


class InputError(AlisaError):
    """A file, a line of input, an option or a request is not usable as given."""


class PromptError(InputError):
    """One prompt of several is not usable; knows which, so that a caller can say it in the user's own numbering.

    Args:
        index: place of the prompt in the list, from 0; people count from 1.
        problem: the rest of the sentence after "Prompt 3".
    """

    def __init__(self, index: int, problem: str) -> None:
        super().__init__(f"Prompt {index + 1} {problem}")
        self.index = index
        self.problem = problem


class RequestError(InputError):
    """One request is not usable.

    Args:
        problem: the rest of the sentence after "The prompt".
    """

    def __init__(self, problem: str) -> None:
        super().__init__(f"The prompt {problem}")
        self.problem = problem


class ModelError(AlisaError):
    """A model directory or hub id cannot be turned into a working decoder."""


class CapacityError(AlisaError):
    """A memory cap is smaller than what is needed; nothing was started and nothing was lost."""
