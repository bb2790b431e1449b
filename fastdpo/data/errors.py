"""The errors about data: their text says what arrived and where, what is needed, what to do."""

ROW_SHAPE = '{"prompt": "...", "chosen": "...", "rejected": "..."}'


class DataError(ValueError):
    """Data that cannot be used as it is; the text names the place, the reason and the remedy."""


class UnknownSplitError(DataError):
    """The data set was found but has no split of the requested name."""
