"""The reference log-probs: a store on disk keyed by content, and the pass that fills it."""

from fastdpo.reference.filling import reference_logps
from fastdpo.reference.identity import reference_identity
from fastdpo.reference.source import ReferenceSource
from fastdpo.reference.store import ReferenceStore

__all__ = ["ReferenceSource", "ReferenceStore", "reference_identity", "reference_logps"]
