"""Whatever bytes come in: a typed error or success, soon; no other exception.

`make test` runs a few hundred derandomized examples of each target; `make soak` goes on for
FASTDPO_FUZZ_S seconds (600), split over the targets.
"""

import json
import os
import random
import time
from io import BytesIO
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from fastdpo.cli.parser import parse
from fastdpo.cli.yaml_file import load_yaml_config
from fastdpo.data import DataError
from fastdpo.data.json_lines import parse_json_lines, read_json
from fastdpo.data.reading import rows_from
from fastdpo.options import DataOptions, ModelOptions, PreferenceOptions
from fastdpo.ref_cache import archive, hash_cache, shards
from fastdpo.ref_cache.store import ReferenceStore
from fastdpo.trainer import checkpoint
from fastdpo.trainer.checkpoint import CheckpointError
from tests.ref_cache.test_store import some_rows

CORPUS = Path(__file__).parent / "corpus"
HANG_S = 30.0  # of CPU time: a hang on any machine, no measure of speed

KEYS = st.sampled_from(["prompt", "chosen", "rejected", "role", "content", "tools", "x"])
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20))
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


def read_lines(content, folder):
    rows, numbers = parse_json_lines(BytesIO(content), "fuzz", max_line_mib=1)
    assert len(rows) == len(numbers)
    for _ in rows_from(rows, "fuzz").preferences():
        pass


def read_document(content, folder):
    path = folder / "fuzz.json"
    path.write_bytes(content)
    read_json(path)


def read_yaml(content, folder):
    path = folder / "fuzz.yaml"
    path.write_bytes(content)
    assert isinstance(load_yaml_config(path), dict)


def parse_config(content, folder):
    """The whole way of a config file, up to the dataclasses of the model and the data."""
    path = folder / "fuzz.yaml"
    path.write_bytes(content)
    groups = [ModelOptions, DataOptions, PreferenceOptions]
    try:
        parse("evaluate", groups, ["--config", str(path)], training=False)
    except SystemExit as stop:
        if stop.code != 2:
            raise AssertionError(f"exit code {stop.code}") from stop
        raise ValueError("refused") from stop


def read_manifest(content, folder):
    (folder / "a").write_text("x")
    (folder / checkpoint.MANIFEST).write_bytes(content)
    checkpoint.verify(folder)


def read_shard(content, folder):
    path = folder / "shard-0.safetensors"
    path.write_bytes(content)
    shards.read(path)


def read_archive(content, folder):
    path = folder / "fuzz.tar"
    path.write_bytes(content)
    archive.import_store(path, folder / "stores")


def read_weight_memory(content, folder):
    path = folder / "weights.json"
    path.write_bytes(content)
    assert isinstance(hash_cache._read_cache(path), dict)


TARGETS = {
    "json lines": (read_lines, DataError),
    "json document": (read_document, DataError),
    "yaml": (read_yaml, ValueError),
    "config": (parse_config, ValueError),
    "manifest": (read_manifest, CheckpointError),
    "shard": (read_shard, shards.ShardError),
    "archive": (read_archive, archive.ArchiveError),
    "weight memory": (read_weight_memory, ()),
}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Good and nearly good inputs of each target, for the mutations to start from."""
    folder = tmp_path_factory.mktemp("seeds")
    sealed = folder / "sealed"
    sealed.mkdir()
    (sealed / "a").write_text("x")
    checkpoint.write_manifest(sealed, {"seed": 1, "loss": {"beta": 0.1}}, {"T": 128})
    store = ReferenceStore(folder / "store", {"weights": "x"})
    store.append(some_rows())
    shard = next(store.folder.glob("shard-*")).read_bytes()
    archive.export_store(store.folder, folder / "store.tar")
    lines = [path.read_bytes() for path in CORPUS.glob("*.jsonl")]
    options = [path.read_bytes() for path in CORPUS.glob("*.yaml")]
    options.append(b"lora_r: 8\nbeta: 0.2\ndataset: x.jsonl\ncolumns: [prompt=a]\n")
    documents = [json.dumps([json.loads(line) for line in lines[0].split(b"\n")[:1]]).encode()]
    memory = {"f": hash_cache._entry("w", "s", 1.0)}
    return {
        "json lines": lines,
        "json document": [*lines, *documents, b'{"data": [{"prompt": "a"}]}'],
        "yaml": options,
        "config": options,
        "manifest": [(sealed / checkpoint.MANIFEST).read_bytes()],
        "shard": [shard, save({"keys": some_array()}, {"format": "1"})],
        "archive": [(folder / "store.tar").read_bytes()],
        "weight memory": [json.dumps(memory).encode()],
    }


def some_array():
    import numpy as np

    return np.zeros(3, np.uint8)


TOKENS = [
    b'"', b"{", b"}", b"[", b"]", b",", b":", b"\n", b"\\u0000", b"\\ud800", b"NaN", b"1e999",
    b"-", b"null", b'"prompt"', b'"chosen"', b"\xff", b"\x00", b"\xef\xbb\xbf", b"&a ", b"*a",
    b"!!python/object:x", b"- ", b"? ", b"|\n", b"9" * 30, b"../", b"/", b"\x7f\xff\xff\xff",
]  # fmt: skip


def mutated(content, draw, seeds):
    """A few flips, cuts, copies and insertions."""
    found = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 3, 8))):
        at = draw.randrange(len(found) + 1)
        end = min(len(found), at + draw.choice((1, 2, 4, 16, 256)))
        kind = draw.randrange(6)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del found[at:end]
        elif kind == 2:
            found[at:at] = draw.choice(TOKENS)
        elif kind == 3:
            found[at:at] = found[at:end] * draw.choice((1, 2, 50))
        elif kind == 4:
            del found[at:]
        else:
            other = draw.choice(seeds)
            start = draw.randrange(len(other) + 1)
            found[at:end] = other[start : start + 64]
    return bytes(found[: 2**20])


def attempt(name, content, folder):
    """Whether it was accepted; anything but success and the target's own error fails the test."""
    target, typed = TARGETS[name]
    began = time.process_time()
    try:
        target(content, folder)
    except typed:
        return False
    except BaseException:
        kept = Path(os.environ.get("FASTDPO_FUZZ_KEEP", folder)) / f"{name.replace(' ', '-')}.fuzz"
        kept.write_bytes(content)
        print(f"{name}: kept in {kept}: {content[:300]!r}")
        raise
    finally:
        took = time.process_time() - began
        assert took < HANG_S, f"{name} took {took:.1f} s on {content[:300]!r}"
    return True


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_inputs(name, seeds, tmp_path, soak):
    draw = random.Random(name)
    count = 0 if soak else 100
    until = time.monotonic() + float(os.environ.get("FASTDPO_FUZZ_S", "600")) / len(TARGETS)
    tried = accepted = 0
    while tried < count or (soak and time.monotonic() < until):
        content = mutated(draw.choice(seeds[name]), draw, seeds[name])
        accepted += attempt(name, content, tmp_path)
        tried += 1
    print(f"{name}: {tried:,} inputs, {accepted:,} accepted")
    assert tried > accepted or name == "weight memory"


@pytest.mark.parametrize("name", TARGETS)
def test_the_unmutated_inputs(name, seeds, tmp_path):
    """At least one of them is accepted: the mutations start from something that counts."""
    accepted = [attempt(name, content, tmp_path) for content in seeds[name]]
    assert any(accepted)


quick = settings(
    derandomize=True, max_examples=60, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@quick
@given(st.lists(VALUES, max_size=4))
def test_any_json_value_as_rows(tmp_path, values):
    lines = "\n".join(json.dumps(value) for value in values).encode("utf-8", "surrogatepass")
    attempt("json lines", lines, tmp_path)
    attempt("json document", lines, tmp_path)
    for value in values:
        attempt("json lines", json.dumps({"prompt": value, "chosen": "b"}).encode(), tmp_path)
        attempt("json lines", json.dumps({"chosen": value, "rejected": value}).encode(), tmp_path)


OPTION_NAMES = st.sampled_from(
    ["model", "lora_r", "dtype", "dataset", "columns", "datasets", "beta", "max_line_mib", "qlora"]
)


@quick
@given(st.dictionaries(OPTION_NAMES, VALUES, max_size=3))
def test_any_yaml_value_as_options(tmp_path, values):
    attempt("config", yaml.safe_dump(values, allow_unicode=True).encode(), tmp_path)


@quick
@given(st.binary(max_size=200))
def test_any_bytes(tmp_path, content):
    for name in TARGETS:
        attempt(name, content, tmp_path)
