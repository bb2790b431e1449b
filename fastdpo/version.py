"""The version, alone in a file so that building and ``--version`` import nothing."""

__version__ = "0.1.0"
