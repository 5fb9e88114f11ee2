"""The errors that resa-hf raises for what a caller can mend. All are `ValueError`s."""


class ResaError(ValueError):
    """Any of them."""


class HookpointError(ResaError):
    """No such hookpoint in the model; the message lists the valid ones."""


class IncompatibleSAEError(ResaError):
    """An SAE that cannot be read, or that does not fit the model or the hookpoint."""


class IncompatibleAdapterError(ResaError):
    """An adapter that does not fit the model; the message names the first tensor that differs."""


class DataError(ResaError):
    """Question-answer rows that cannot be used."""


class TrainingError(ResaError):
    """Training that cannot end well, stopped; the message says why, what is kept, and what to change."""


class MemoryFullError(ResaError):
    """Memory was full elsewhere than in training; the message says what takes less."""


class AnswerError(ResaError):
    """A model that cannot answer; the message says why."""


class JobError(ResaError):
    """A job of a run failed; the message names it. What other jobs have finished is kept."""


class PublishError(ResaError):
    """Something that cannot be published as it is; nothing of it is on the Hub then, unless the message says so."""


class ExploreError(ResaError):
    """Something that a visitor of the explorer cannot have; the message names no path of this machine."""
