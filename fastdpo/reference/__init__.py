"""The reference log-probs: a store on disk keyed by content, and the pass that fills it."""

from fastdpo.reference.asked import asked_for
from fastdpo.reference.filling import reference_logps
from fastdpo.reference.identity import load_identified, reference_identity
from fastdpo.reference.source import ReferenceSource
from fastdpo.reference.store import ReferenceStore

__all__ = [
    "ReferenceSource",
    "ReferenceStore",
    "asked_for",
    "load_identified",
    "reference_identity",
    "reference_logps",
]
