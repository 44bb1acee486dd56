"""Files of a saved cache: whole or not there, mapped and not copied."""

import errno
import hashlib
import json
import math
import os
import pickle
import re
import resource
import weakref
from contextlib import contextmanager
from functools import cache as once, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import Mock

import pytest
import safetensors.torch
import torch
from hypothesis import given, strategies as st

from lct_core import files
from lct_core.files import read_json, read_tensors, write_json, write_tensors
from tests.cache.models import MANY, Trap

linux = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="asks Linux what is mapped where")
ABOUT = {"id": '["shot", 3]', "prompt": "a cat\nnext to a \N{SNOWMAN}"}


def same(got, expected):
    """Bit for bit: NaN equals NaN, and -0.0 is not 0.0."""
    return sorted(got) == sorted(expected) and all(
        (got[name].shape, got[name].dtype) == (x.shape, x.dtype)
        and torch.equal(got[name].reshape(-1).view(torch.uint8), x.reshape(-1).view(torch.uint8))
        for name, x in expected.items()
    )


# Tensors there and back.


def test_there_and_back(tmp_path):
    path = tmp_path / "shot.safetensors"
    digest = write_tensors(path, MANY, ABOUT)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert write_tensors(path, MANY, ABOUT) == digest  # nothing but the content
    for checked in (None, digest):
        tensors, about = read_tensors(path, digest=checked)
        assert same(tensors, MANY)
        assert about == ABOUT
        assert all(x.data_ptr() % x.itemsize == 0 for x in tensors.values())
    assert same(safetensors.torch.load_file(path), MANY)  # anybody's reader
    assert [file.name for file in tmp_path.iterdir()] == ["shot.safetensors"]
    write_tensors(str(path), {}, {})
    assert read_tensors(str(path)) == ({}, {})


def test_reads_what_others_wrote(tmp_path):
    path = tmp_path / "shot.safetensors"
    safetensors.torch.save_file({name: x.contiguous() for name, x in MANY.items()}, path, metadata=ABOUT)
    tensors, about = read_tensors(path, digest=hashlib.sha256(path.read_bytes()).hexdigest())
    assert same(tensors, MANY)
    assert about == ABOUT


def mapped(x):
    """The mapping in which a tensor lies, and how many of its bytes are in memory."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    for i, line in enumerate(lines):
        start, dash, stop = line.partition(" ")[0].partition("-")
        if dash and int(start, 16) <= x.data_ptr() < int(stop, 16):
            return line, next(int(more.split()[1]) * 1024 for more in lines[i:] if more.startswith("Rss:"))
    raise AssertionError("not mapped")


@linux
def test_reading_maps_and_copies_nothing(tmp_path):
    path, size = tmp_path / "shot.safetensors", 1 << 25
    digest = write_tensors(path, {"k": torch.zeros(size, dtype=torch.int8), "v": torch.zeros(9)}, {})
    tensors, _ = read_tensors(path, digest=digest)  # the check reads the file, and keeps nothing of it
    where, held = mapped(tensors["k"])
    assert where.endswith(str(path))
    assert mapped(tensors["v"])[0] == where
    assert held < size // 8
    assert int(tensors["k"].long().sum()) == 0
    assert mapped(tensors["k"])[1] >= size


def test_writing_to_what_was_read_leaves_the_file(tmp_path):
    path = tmp_path / "shot.safetensors"
    digest = write_tensors(path, MANY, {})
    tensors, _ = read_tensors(path)
    tensors["float32"].fill_(7)
    assert same(read_tensors(path, digest=digest)[0], MANY)


def test_what_was_read_outlives_its_file(tmp_path):
    path = tmp_path / "shot.safetensors"
    write_tensors(path, MANY, {})
    tensors, _ = read_tensors(path)
    write_tensors(path, {"float32": torch.zeros(99)}, {})
    assert same(tensors, MANY)
    path.unlink()
    assert same(tensors, MANY)


def test_one_tensor_at_a_time_is_made_contiguous(tmp_path, monkeypatch):
    """As one is brought over from a GPU: the copy of one is gone before the next is made."""
    made, alive = [], []

    def watched(x):
        alive.append(sum(part() is not None for part in made))
        part = plain(x)
        made.append(weakref.ref(part))
        return part

    plain = files._bytes
    monkeypatch.setattr(files, "_bytes", watched)
    write_tensors(tmp_path / "shot.safetensors", {str(i): torch.randn(4, 6).T for i in range(5)}, {})
    assert alive == [0] * 5


def test_refuses_other_dtypes(tmp_path):
    with pytest.raises(ValueError, match=r"^tensors: got {'x': torch.int64}, expected torch.float64, .*torch.int8"):
        write_tensors(tmp_path / "shot.safetensors", {"x": torch.zeros(2, dtype=torch.int64)}, {})
    assert list(tmp_path.iterdir()) == []


# Files that are not what was written.


@once
def whole():
    """A file of tensors and its digest."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "shot.safetensors"
        return write_tensors(path, MANY, ABOUT), path.read_bytes()


@given(st.data())
def test_any_change_is_noticed(data):
    digest, content = whole()
    place = data.draw(st.integers(0, len(content) - 1))
    changed = data.draw(
        st.sampled_from(
            [
                content[:place],
                content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :],
                content + bytes(place),
            ]
        ).filter(lambda changed: changed != content)
    )
    with TemporaryDirectory() as folder:
        path = Path(folder) / "shot.safetensors"
        path.write_bytes(changed)
        message = f"^{path}: truncated or edited since it was written: its SHA-256 .* {digest}; restore it from a copy"
        with pytest.raises(ValueError, match=message):
            read_tensors(path, digest=digest)
        if len(changed) != len(content):
            with pytest.raises(ValueError, match=f"^{path}: truncated, edited, or no safetensors file"):
                read_tensors(path)


@pytest.mark.parametrize("write", [pickle.dump, torch.save])
def test_pickles_are_refused_and_not_opened(tmp_path, write):
    path = tmp_path / "shot.safetensors"
    with path.open("wb") as file:
        write({"k": Trap()}, file)
    for digest in (None, hashlib.sha256(path.read_bytes()).hexdigest()):
        with pytest.raises(ValueError, match="no safetensors file"):
            read_tensors(path, digest=digest)
    with pytest.raises(ValueError, match="not written by this library"):
        read_json(path)
    assert Trap.sprung == []


def test_missing_files(tmp_path):
    for read in (read_tensors, read_json):
        for path in (tmp_path / "gone", tmp_path):
            with pytest.raises(FileNotFoundError, match=f"{path}: no such file; restore it from a copy, or check"):
                read(path)


# Writing that fails. Each of these is a disk on which it does.


BIG = {"k": torch.ones(300_000), "v": torch.zeros(300_000)}


@contextmanager
def always_full(path):
    """A real device without room, in the place of the file that is being written."""
    path.with_name(f"{path.stem}.partial{path.suffix}").symlink_to("/dev/full")
    yield


@contextmanager
def full_at_the_end(path, error=errno.ENOSPC):
    """One that notices only when it is asked to have written everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", Mock(side_effect=OSError(error, os.strerror(error))))
        yield


@contextmanager
def without_folders(path):
    """A file system that can't be asked to keep names: no failure, since the file is there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", Mock(side_effect=[None, OSError(errno.EINVAL, os.strerror(errno.EINVAL))] * 2))
        yield


@contextmanager
def with_a_limit(path):
    """The system's own limit on a file's size, met half-way."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def stopped(path):
    """Somebody stops the process at the last moment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", Mock(side_effect=KeyboardInterrupt))
        yield


WAYS = [
    pytest.param(always_full, OSError, errno.ENOSPC, marks=linux),
    (full_at_the_end, OSError, errno.ENOSPC),
    (partial(full_at_the_end, error=errno.EDQUOT), OSError, errno.EDQUOT),
    (partial(full_at_the_end, error=errno.EIO), OSError, errno.EIO),
    (with_a_limit, OSError, errno.EFBIG),
    (stopped, KeyboardInterrupt, None),
]


@pytest.mark.parametrize(("disk", "kind", "number"), WAYS)
@pytest.mark.parametrize("before", [True, False])
def test_a_failure_leaves_what_was_there(tmp_path, disk, kind, number, before):
    tensors, index = tmp_path / "shot.safetensors", tmp_path / "index.json"
    if before:
        digest = write_tensors(tensors, MANY, ABOUT)
        write_json(index, ["old"])
    needed = {tensors: sum(x.nbytes for x in BIG.values()), index: len(json.dumps(list(range(999)), indent=1))}
    for path, write in (
        (tensors, partial(write_tensors, tensors, BIG, {})),
        (index, partial(write_json, index, list(range(999)))),
    ):
        with disk(path), pytest.raises(kind) as caught:
            write()
        if number is not None:
            assert caught.value.errno == number
        if number in (errno.ENOSPC, errno.EDQUOT):
            words = str(caught.value)
            assert f"{path}: the disk is full: it needs " in words
            assert "are free; what was written before is whole; free some space, or use a folder on another" in words
            size, free = (int(n) for n in re.findall(r"(\d+) (?:bytes|are free)", words))
            assert size >= needed[path]
            assert free > 0
    assert sorted(file.name for file in tmp_path.iterdir()) == (["index.json", "shot.safetensors"] if before else [])
    if before:
        assert same(read_tensors(tensors, digest=digest)[0], MANY)
        assert read_json(index) == ["old"]


def test_folders_that_cannot_be_synced(tmp_path):
    path = tmp_path / "index.json"
    with without_folders(path):
        write_json(path, [1])
    assert read_json(path) == [1]


def test_what_a_killed_process_left_is_written_over(tmp_path):
    path = tmp_path / "shot.safetensors"
    path.with_name("shot.partial.safetensors").write_bytes(bytes(100_000))
    assert same(read_tensors(path, digest=write_tensors(path, MANY, {}))[0], MANY)
    assert [file.name for file in tmp_path.iterdir()] == ["shot.safetensors"]


def test_everything_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    """The file's content before its name, and its name before the call returns."""
    order = []

    def fsync(handle):
        order.append(os.readlink(f"/proc/self/fd/{handle}"))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *paths: order.append(tuple(map(str, paths))))
    path = tmp_path / "index.json"
    write_json(path, {})
    partial = str(tmp_path / "index.partial.json")
    assert order == [partial, (partial, str(path)), str(tmp_path)]


# Indices.


numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(values)
def test_json_there_and_back(value):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "index.json"
        write_json(path, value)
        again = read_json(path)
    assert repr(again) == repr(value)  # floats to the last bit, and -0.0


def test_an_edited_index_is_noticed(tmp_path):
    path = tmp_path / "index.json"
    write_json(path, {"shots": [{"id": "a", "origin": 3}], "level": (0.1, 0.2)})
    assert read_json(path) == {"shots": [{"id": "a", "origin": 3}], "level": [0.1, 0.2]}
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text)))  # laid out in another way, it says the same
    assert read_json(path)["level"] == [0.1, 0.2]
    path.write_text(text.replace('"origin": 3', '"origin": 4'))
    with pytest.raises(ValueError, match=f"^{path}: edited since it was written: its content has another SHA-256"):
        read_json(path)
    for broken in (text[:-9], "", "3", "[]", "{}", '{"content": 3}', "\xff"):
        path.write_text(broken, encoding="latin-1")
        with pytest.raises(ValueError, match=f"^{path}: truncated, edited, or not written by this library"):
            read_json(path)


@pytest.mark.parametrize("value", [math.nan, math.inf, [{"x": -math.inf}]])
def test_json_has_no_such_numbers(tmp_path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "index.json", value)
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(tmp_path / "index.json", {"x": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == []
