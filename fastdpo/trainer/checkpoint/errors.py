"""The error that everything about checkpoints raises."""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or belongs to another run; or none could be written."""
