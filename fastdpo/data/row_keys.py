"""The key of a completion in its context: by it reference log-probs are found, and copies told."""

import hashlib
import struct

import numpy as np

KEY_FORMAT = 1
KEY_BYTES = 32


def row_key(
    prompt_ids: np.ndarray, completion_ids: np.ndarray, mask: np.ndarray | None = None
) -> bytes:
    """sha256 of a completion in its context: the token ids, and which of them are scored.

    Args:
        prompt_ids: (P,) int32.
        completion_ids: (C,) int32.
        mask: (C,) bool of the scored tokens; None, which has the key of one that is all True,
            where every token is scored.
    """
    return completion_key(prompt_digest(prompt_ids), completion_ids, mask)


def prompt_digest(prompt_ids: np.ndarray) -> "hashlib._Hash":
    """The state of a sha256 that has read a prompt; a copy of it reads each completion."""
    digest = hashlib.sha256(struct.pack("<qq", KEY_FORMAT, len(prompt_ids)))
    digest.update(np.ascontiguousarray(prompt_ids, dtype="<i4").tobytes())
    return digest


def completion_key(
    digest: "hashlib._Hash", completion_ids: np.ndarray, mask: np.ndarray | None
) -> bytes:
    """The key of a completion, whose prompt `digest` has read; it reads on."""
    digest.update(np.ascontiguousarray(completion_ids, dtype="<i4").tobytes())
    if mask is not None and not mask.all():
        # -1 is no token id, so no completion without a mask has these bytes.
        places = np.concatenate([[-1], np.flatnonzero(mask)])
        digest.update(places.astype("<i4").tobytes())
    return digest.digest()
