"""The reference log-probs: a store on disk keyed by content, and the pass that fills it."""

from fastdpo.ref_cache.compute import reference_logps
from fastdpo.ref_cache.hash_cache import HASH_CACHE_FILE
from fastdpo.ref_cache.identity import reference_identity
from fastdpo.ref_cache.run_notes import describe_request
from fastdpo.ref_cache.source import RefLogpsProvider
from fastdpo.ref_cache.store import ReferenceStore, StoreOptions

__all__ = [
    "HASH_CACHE_FILE",
    "RefLogpsProvider",
    "ReferenceStore",
    "StoreOptions",
    "describe_request",
    "reference_identity",
    "reference_logps",
]
