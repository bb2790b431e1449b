"""The error of this room."""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or belongs to another run; or none could be written."""
