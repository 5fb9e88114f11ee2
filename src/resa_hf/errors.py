"""The errors that resa-hf raises for what a caller can mend. All are `ValueError`s."""


class HookpointError(ValueError):
    """No such hookpoint in the model; the message lists the valid ones."""


class IncompatibleSAEError(ValueError):
    """An SAE that cannot be read, or that does not fit the model or the hookpoint."""


class IncompatibleAdapterError(ValueError):
    """An adapter that does not fit the model; the message names the first tensor that differs."""


class DataError(ValueError):
    """Question-answer rows that cannot be used."""


class TrainingError(ValueError):
    """Training that cannot end well, stopped; the message says why, what is kept, and what to change."""


class JobError(ValueError):
    """A job of a run failed; the message names it. What other jobs have finished is kept."""


class PublishError(ValueError):
    """Something that cannot be published as it is; nothing of it is on the Hub then, unless the message says so."""


class ExploreError(ValueError):
    """Something that a visitor of the explorer cannot have; the message names no path of this machine."""
