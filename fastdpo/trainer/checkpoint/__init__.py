"""Checkpoints that are whole or do not exist: no pickle inside, a manifest with checksums last.

A checkpoint folder is filled under a temporary name, completed by `MANIFEST.json` (size and sha256
of every file) and renamed. Resuming takes the newest folder that verifies.
"""

from fastdpo.trainer.checkpoint.errors import CheckpointError
from fastdpo.trainer.checkpoint.folders import (
    MANIFEST,
    Manifest,
    locked,
    newest_verified,
    publish,
    remove_stale_tmp,
    rotate,
    verify,
    write_manifest,
)
from fastdpo.trainer.checkpoint.preflight import (
    claimed,
    require_other_folder,
    require_room,
    require_unused,
)
from fastdpo.trainer.checkpoint.same_run import require_same_on_ranks, require_same_run
from fastdpo.trainer.checkpoint.training_state import (
    load_extra_state,
    load_optimizer,
    load_rng_state,
    require_savable,
    save_extra_state,
    save_optimizer,
    save_rng_state,
)

__all__ = [
    "MANIFEST",
    "CheckpointError",
    "Manifest",
    "write_manifest",
    "verify",
    "newest_verified",
    "publish",
    "rotate",
    "locked",
    "claimed",
    "remove_stale_tmp",
    "require_same_run",
    "require_same_on_ranks",
    "require_room",
    "require_unused",
    "require_savable",
    "require_other_folder",
    "save_optimizer",
    "load_optimizer",
    "save_rng_state",
    "load_rng_state",
    "save_extra_state",
    "load_extra_state",
]
