"""The reference store on disk: what it finds, what it refuses, what hostile files may not do."""

import json
import math
import random

import numpy as np
import pytest
from safetensors.numpy import save

from fastdpo.ref_cache import ReferenceStore
from fastdpo.ref_cache import shards as shards_module
from fastdpo.ref_cache.store import ScoredCompletion
from fastdpo.system import files
from tests.ref_cache.test_compute import IDENTITY, shards, temporaries

# The store and what may happen to it


def some_rows(count=3, seed=0):
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        tokens = -draw.random(draw.integers(1, 6)).astype(np.float32)
        rows.append(ScoredCompletion(draw.bytes(32), float(tokens.sum()), tokens))
    return rows


def keys_of(rows):
    return [row.key for row in rows]


def logps_of(rows):
    return [row.logps for row in rows]


def lookup(root, rows):
    """What a reader that has just been started finds."""
    return ReferenceStore(root, IDENTITY).lookup(keys_of(rows))


def written(root, rows, name=None):
    """The path of the shard that holds the rows."""
    before = shards(root)
    ReferenceStore(root, IDENTITY).append(rows)
    (path,) = set(shards(root)) - set(before)
    return path if name is None else path.rename(path.with_name(f"shard-{name}.safetensors"))


def test_every_flipped_bit_is_noticed(tmp_path, caplog):
    good, hurt = some_rows(seed=1), some_rows(count=2, seed=2)
    keep = written(tmp_path, good)
    path = written(tmp_path, hurt)
    content, kept = path.read_bytes(), keep.read_bytes()
    header = int.from_bytes(content[:8], "little")
    assert all(name in content[: 8 + header] for name in (b'"keys"', b'"token_logps"', b"sha256"))
    draw = random.Random(3)
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        assert np.isnan(lookup(tmp_path, hurt)).all(), f"byte {at} of {len(content)}"
        assert lookup(tmp_path, good).tolist() == logps_of(good)
        aside = path.with_name(path.name + ".bad")
        assert aside.read_bytes() == damaged
        aside.unlink()
    assert keep.read_bytes() == kept
    assert len(caplog.records) == len(content)
    path.write_bytes(content)
    assert lookup(tmp_path, hurt).tolist() == logps_of(hurt)


def checked(tensors):
    """A shard whose checksum is right, whatever it holds."""
    return save(tensors, {"format": "1", "sha256": shards_module.checksum(tensors)})


def header_only(header):
    content = json.dumps(header).encode()
    return len(content).to_bytes(8, "little") + content + bytes(16)


ROWS = some_rows(count=2, seed=5)
RIGHT = {
    "keys": np.frombuffer(b"".join(keys_of(ROWS)), np.uint8),
    "logps": np.array(logps_of(ROWS)),
    "tokens": np.array([len(row.token_logps) for row in ROWS]),
    "token_logps": np.concatenate([row.token_logps for row in ROWS]),
}
SCORED = len(RIGHT["token_logps"])
BARE = {name: tensor for name, tensor in RIGHT.items() if name != "token_logps"}
HOSTILE = {
    "huge header": (2**63 - 1).to_bytes(8, "little") + b"{}",
    "longer header than file": (2**20).to_bytes(8, "little") + b"{}",
    "no JSON": (8).to_bytes(8, "little") + b"\x80\x05K\x01.   ",
    "huge shape": header_only({"keys": {"dtype": "U8", "shape": [2**61], "data_offsets": [0, 16]}}),
    "bf16": header_only({"keys": {"dtype": "BF16", "shape": [8], "data_offsets": [0, 16]}}),
    "f8": header_only({"keys": {"dtype": "F8_E8M0", "shape": [16], "data_offsets": [0, 16]}}),
    "unknown dtype": header_only({"keys": {"dtype": "X", "shape": [8], "data_offsets": [0, 16]}}),
    "no tensors": checked({}),
    "no logps": checked({name: RIGHT[name] for name in ("keys", "tokens", "token_logps")}),
    "one more tensor": checked(RIGHT | {"more": np.zeros(1)}),
    "ragged keys": checked(RIGHT | {"keys": RIGHT["keys"][:-1]}),
    "fewer keys": checked(RIGHT | {"keys": RIGHT["keys"][:32]}),
    "more keys": checked(RIGHT | {"keys": np.tile(RIGHT["keys"], 2)}),
    "fewer logps": checked(RIGHT | {"logps": RIGHT["logps"][:1]}),
    "keys in rows": checked(RIGHT | {"keys": RIGHT["keys"].reshape(2, 32)}),
    "scalar logps": checked(RIGHT | {"logps": np.array(-1.0)}),
    "float32 logps": checked(RIGHT | {"logps": RIGHT["logps"].astype(np.float32)}),
    "words as keys": checked(RIGHT | {"keys": RIGHT["keys"].view(np.uint32)}),
    "NaN": checked(RIGHT | {"logps": np.array([np.nan, -1.0])}),
    "infinite token": checked(RIGHT | {"token_logps": np.full(SCORED, -np.inf, np.float32)}),
    "sums of 0": checked(RIGHT | {"logps": np.zeros(2)}),
    "halved sums": checked(RIGHT | {"logps": RIGHT["logps"] / 2}),
    "one sum off by 0.001": checked(RIGHT | {"logps": RIGHT["logps"] - [0, 1e-3]}),
    "exchanged sums": checked(RIGHT | {"logps": RIGHT["logps"][::-1].copy()}),
    "positive": checked({n: -t if "logps" in n else t for n, t in RIGHT.items()}),
    "positive sums": checked(BARE | {"logps": -RIGHT["logps"]}),
    "a positive sum": checked(BARE | {"logps": np.array([-1.0, 1e-9])}),
    "negative count": checked(RIGHT | {"tokens": np.array([-1, SCORED + 1])}),
    "count of 2^62": checked(RIGHT | {"tokens": np.array([2**62, 2**62])}),
    "wrapping counts": checked(RIGHT | {"tokens": np.array([2**63 - 1, -(2**63) + 1 + SCORED])}),
    "fewer counts": checked(RIGHT | {"tokens": np.array([SCORED])}),
    "other format": save(RIGHT, {"format": "2", "sha256": shards_module.checksum(RIGHT)}),
    "no checksum": save(RIGHT, {"format": "1"}),
    "no metadata": save(RIGHT),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_shard_is_set_aside(tmp_path, caplog, kind):
    good = some_rows(seed=1)
    path = written(tmp_path, good).with_name("shard-0.safetensors")
    path.write_bytes(HOSTILE[kind])
    assert np.isnan(lookup(tmp_path, ROWS)).all()
    assert lookup(tmp_path, good).tolist() == logps_of(good)
    assert path.with_name("shard-0.safetensors.bad").exists()
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "is damaged" in warning
    if kind == "other format":
        assert "it has format '2', and this fastdpo reads 1" in warning


def test_the_right_shard_beside_the_hostile_ones_is_read(tmp_path):
    path = written(tmp_path, some_rows(seed=1)).with_name("shard-0.safetensors")
    path.write_bytes(checked(RIGHT))
    assert lookup(tmp_path, ROWS).tolist() == logps_of(ROWS)


def test_two_writers_in_turns(tmp_path):
    first, second = ReferenceStore(tmp_path, IDENTITY), ReferenceStore(tmp_path, IDENTITY)
    rows = some_rows(count=8)
    for at, store in enumerate((first, second, second, first)):
        store.append(rows[2 * at : 2 * at + 2])
        for reader in (first, second):
            found = reader.lookup(keys_of(rows))
            assert found[: 2 * at + 2].tolist() == logps_of(rows[: 2 * at + 2])
            assert np.isnan(found[2 * at + 2 :]).all()
    other = ReferenceStore(tmp_path, {"model": "another"})
    assert np.isnan(other.lookup(keys_of(rows))).all(), "stores of two references share rows"


def test_equal_keys_have_the_value_of_the_lowest_shard_name(tmp_path):
    (row,) = some_rows(count=1)
    reader = ReferenceStore(tmp_path, IDENTITY)
    for name, logps, wanted in (("m", -1.0, -1.0), ("z", -2.0, -1.0), ("a", -3.0, -3.0)):
        written(tmp_path, [ScoredCompletion(row.key, logps, np.float32([logps]))], name)
        assert reader.lookup([row.key]).tolist() == [wanted]
        assert lookup(tmp_path, [row]).tolist() == [wanted]


def test_what_a_killed_writer_left_is_ignored(tmp_path):
    rows = some_rows()
    path = written(tmp_path, rows)
    path.rename(files.temporary_name(path))
    assert np.isnan(lookup(tmp_path, rows)).all()
    assert len(temporaries(tmp_path)) == 1, "it may belong to a writer that lives"


def test_keys_that_end_in_zeros_stay_apart(tmp_path):
    stem = b"k" * 29
    ends = [b"\0\0\0", b"\0\0\1", b"\1\0\0", b"\1\1\0"]
    rows = [ScoredCompletion(stem + end, -float(i), np.float32([-i])) for i, end in enumerate(ends)]
    written(tmp_path, rows[1:])
    assert lookup(tmp_path, rows).tolist() == pytest.approx([np.nan, -1, -2, -3], nan_ok=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_log_prob_that_is_not_finite_is_refused(tmp_path, value):
    rows = some_rows()
    store = ReferenceStore(tmp_path, IDENTITY)
    tokens = rows[1].token_logps
    for logps, token_logps in ((value, tokens), (-1.0, np.full_like(tokens, value))):
        rows[1] = ScoredCompletion(rows[1].key, logps, token_logps)
        with pytest.raises(ValueError, match=f"log-prob is {value}.*bfloat16"):
            store.append(rows)
    for row in (
        ScoredCompletion(b"short", -1.0, tokens),
        ScoredCompletion(rows[1].key, -1.0, tokens[:0]),
    ):
        with pytest.raises(ValueError, match="not a shard of scored completions"):
            store.append([rows[0], row])
    assert not shards(tmp_path)
    assert not temporaries(tmp_path)
    store.append([])
    assert not shards(tmp_path)
