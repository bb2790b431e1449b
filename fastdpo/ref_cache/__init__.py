"""The reference log-probs: a store on disk keyed by content, and the pass that fills it."""

from fastdpo.modeling.weight_hash import load_identified
from fastdpo.ref_cache.compute import reference_logps
from fastdpo.ref_cache.identity import reference_identity
from fastdpo.ref_cache.run_notes import describe_request
from fastdpo.ref_cache.source import RefLogpsProvider
from fastdpo.ref_cache.store import ReferenceStore

__all__ = [
    "RefLogpsProvider",
    "ReferenceStore",
    "describe_request",
    "load_identified",
    "reference_identity",
    "reference_logps",
]
