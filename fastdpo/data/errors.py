"""The errors of this room: what arrived and where, what is needed, what to do."""

ROW_SHAPE = '{"prompt": "...", "chosen": "...", "rejected": "..."}'


class DataError(ValueError):
    """Input that can't be used as it is; the text names the place, the reason and the remedy."""


class UnknownSplitError(DataError):
    """The data set was found but has no split of the name that was asked for."""
