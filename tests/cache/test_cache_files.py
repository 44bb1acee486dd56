"""Files of a saved cache: whole or not there, mapped and not copied, told apart where they were changed."""

import copy
import errno
import gc
import hashlib
import json
import math
import os
import pickle
import re
import resource
import subprocess
import sys
import weakref
from contextlib import contextmanager
from dataclasses import replace
from functools import cache as once
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar
from unittest.mock import Mock

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from lct_backbones.mmdit import tiny
from lct_core import Experts, KVCache, Shot, retrofit
from lct_core.cache import Budget, files
from lct_core.cache.files import read_json, read_tensors, write_json, write_tensors
from lct_core.cache.identity import check_identity, identify
from tests.toys import CROSS, toy

linux = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="asks Linux what is mapped where")

MANY = {
    "float32": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "bfloat16": torch.randn(1, 7, 2, 3).bfloat16(),
    "float16": torch.randn(9).half(),
    "float64": torch.randn(2, 2, dtype=torch.float64),
    "int8": torch.arange(-128, 127, dtype=torch.int8),
    "float8": torch.randn(5).to(torch.float8_e4m3fn),
    "nothing": torch.empty(2, 0, 4),
    "scalar": torch.tensor(math.pi),
    "turned": torch.randn(4, 6).T,
    "a part": torch.randn(2, 9, 3)[:, 2:5],
    "odd \N{SNOWMAN}": torch.tensor([float("nan"), float("-inf"), -0.0]),
}
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


class Trap:
    """Unpickled, it does what no file should."""

    sprung: ClassVar[list] = []

    def __reduce__(self):
        return self.sprung.append, (1,)


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
    path.with_name(path.name + ".partial").symlink_to("/dev/full")
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
    path.with_name("shot.safetensors.partial").write_bytes(bytes(100_000))
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
    assert order == [f"{path}.partial", (f"{path}.partial", str(path)), str(tmp_path)]


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


# Which model it was.


def mmdit(*, scheme="anchored", dtype=torch.float32, change=None):
    model = tiny()
    if change:
        change(model)
    return retrofit(model.to(dtype), scheme=scheme, backbone="mmdit")


def other(**config):
    adapter = toy(**config)
    return retrofit(adapter.model, backbone=adapter)


def crossed(text):
    adapter = toy(**CROSS)
    return retrofit(adapter.model, backbone=adapter, text=text)


def tuned(model):
    model.video_out.bias.data += 2**-10


def renamed(model):
    model.another = model.video_out
    del model.video_out


def slowed(model):
    model.theta *= 1.1


def widened(model):
    model.extra = torch.nn.Parameter(torch.zeros(3))


def two(low, boundary=0.5):
    return Experts(mmdit(), low, boundary=boundary)


DIFFERENT = {
    "class": (
        mmdit,
        other,
        r"class differs: the cache was written by 'MMDiT', this is 'Toy'; use a model of the class",
    ),
    "scheme": (mmdit, partial(mmdit, scheme="paper"), r"coordinate scheme differs: .* by 'anchored', this is 'paper'"),
    "text": (partial(crossed, "own"), partial(crossed, "all"), r"text scope differs: .* by 'own', this is 'all'"),
    "dtype": (
        mmdit,
        partial(mmdit, dtype=torch.bfloat16),
        r"dtype differs: .* by \['float32'\], this is \['bfloat16'\]; use the model in the dtype that wrote it",
    ),
    "parameters": (mmdit, partial(mmdit, change=widened), r"number of parameters differs: .*; use a model of the size"),
    "shapes": (mmdit, partial(mmdit, change=renamed), r"names and shapes of parameters differ: use a model of the"),
    "traits": (
        other,
        partial(other, pairing="half"),
        r"traits differ: .* by {'pairing': 'interleaved'}, this is {'pairing': 'half'}; use the configuration",
    ),
    "theta": (mmdit, partial(mmdit, change=slowed), r"RoPE frequencies differ: use the configuration that wrote it$"),
    "weights": (
        mmdit,
        partial(mmdit, change=tuned),
        r"weights differ: the cache was written by other weights of this class; use the checkpoint that wrote it$",
    ),
}


@pytest.mark.parametrize(("wrote", "reads", "message"), DIFFERENT.values(), ids=DIFFERENT)
def test_what_differs_is_named(wrote, reads, message):
    saved = json.loads(json.dumps(identify(wrote())))
    check_identity(saved, wrote())
    with pytest.raises(ValueError, match=f"^model: its {message}"):
        check_identity(saved, reads())


def test_experts_are_told_apart():
    saved = json.loads(json.dumps(identify(two(mmdit()))))
    check_identity(saved, two(mmdit()))
    for reads, message in (
        (two(mmdit(change=tuned)), "low-noise expert's weights differ"),
        (two(mmdit(), boundary=0.6), "boundary between its experts differs: .* by 0.5, this is 0.6"),
        (mmdit(), "class differs: the cache was written by 'Experts', this is 'MMDiT'"),
    ):
        with pytest.raises(ValueError, match=f"^model: its {message}"):
            check_identity(saved, reads)


def test_a_copy_is_the_same_model():
    model = mmdit()
    saved = identify(model)
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert identify(one) == saved
    model.backbone.requires_grad_(False)
    assert identify(model) == saved
    assert identify(retrofit(tiny(), kernel="sdpa", batch_shots=True)) == saved  # how it runs is not what it is


def test_every_parameter_is_looked_at():
    model = mmdit()
    before = identify(model)["weights"]
    for parameter in model.backbone.parameters():
        flat = parameter.data.view(-1)
        for place in (0, -1):
            kept = flat[place].clone()
            flat[place] += 1
            assert identify(model)["weights"] != before
            flat[place] = kept
    assert identify(model)["weights"] == before


def test_devices_may_differ_in_the_last_bits_of_angles():
    saved = identify(mmdit())
    assert len(saved["angles"]) == mmdit().backbone.head_dim // 2
    saved["angles"] = [angle * (1 + 1e-7) for angle in saved["angles"]]
    check_identity(saved, mmdit())
    saved["angles"].pop()
    with pytest.raises(ValueError, match="RoPE frequencies differ"):
        check_identity(saved, mmdit())
    assert identify(other(pairing=None))["angles"] == []


def test_any_kind_of_weight():
    """Weights of no, one and few values, of strides and of dtypes of their own."""
    model = mmdit()
    for name, x in MANY.items():
        model.backbone.register_parameter(f"own {name}", torch.nn.Parameter(x, requires_grad=False))
    assert identify(model)["dtype"] == ["bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "int8"]


def test_offloaded_weights_cannot_be_told():
    model = mmdit()
    model.backbone.video_out.to("meta")
    with pytest.raises(
        ValueError, match=r"^model: 2 of its \d+ weights .* such as 'video_out.weight': they are offloaded"
    ):
        identify(model)


# A saved cache.

SHOTS = [Shot(2, (2, 2, 3)), Shot(1, (1, 1, 1)), Shot(3, (1, 4, 2)), Shot(1, (3, 1, 2)), Shot(4, (2, 2, 2))]
IDS = ["a", 7, ("b", (1, "c")), "7", "e"]
CACHES = {
    "float32": (mmdit, {}),
    "bfloat16": (partial(mmdit, dtype=torch.bfloat16), {"branch": "negative"}),
    "float64": (partial(mmdit, dtype=torch.float64), {"storage": "int8"}),
    "paper": (partial(mmdit, scheme="paper", dtype=torch.float64), {"capacity": 99}),
    "cross": (partial(crossed, "all"), {}),
    "int8": (mmdit, {"storage": "int8"}),
    "fp8": (partial(mmdit, dtype=torch.bfloat16), {"storage": "fp8"}),
}


@torch.no_grad()
def shoot(model, cache, i, level=0.5):
    dtype = next(model.backbone.parameters()).dtype
    shot = model.adapter.example(SHOTS[i], batch=1, generator=torch.Generator().manual_seed(i), dtype=dtype)
    return model([shot], torch.tensor([level]), pattern="context_causal", cache=cache)[0]


def filled(model, **options):
    """A cache of three shots: one of them not selected, the others moved."""
    cache = KVCache(**options)
    for i in range(3):
        shoot(model, cache, i, level=i / 4)
        cache.append(IDS[i], prompts=[f"shot {i} \N{SNOWMAN}"])
    cache.select([IDS[2], IDS[0]])
    cache.pin(IDS[0])
    return cache


def go_on(model, cache):
    """Generate further: with what is selected, with what was not, and with all of it somewhere else."""
    outputs = [shoot(model, cache, 3, level) for level in (1.0, 0.3)]
    cache.append(IDS[3])
    outputs.append(shoot(model, cache, 4))
    cache.select([IDS[1], IDS[3], IDS[2]])
    outputs.append(shoot(model, cache, 4))
    cache.reposition([5, 9, 30])
    return [*outputs, shoot(model, cache, 4)]


def known(cache):
    """What a cache knows of its shots, but where they lie."""
    return [replace(entry, tier="device") for entry in cache.held], cache.ids, cache.end, cache.errors, cache.branch


def elsewhere(folder):
    """What another process makes of the caches that it finds."""
    went_on = {name: go_on(model(), KVCache.load(folder / name, model())) for name, (model, _) in CACHES.items()}
    torch.save(went_on, folder / "went on")


def test_generation_goes_on_in_another_process(tmp_path):
    expected = {}
    for name, (model, options) in CACHES.items():
        cache = filled(model(), **options)
        cache.save(tmp_path / name, model())
        assert known(KVCache.load(tmp_path / name, model())) == known(cache)
        expected[name] = go_on(model(), cache)
    tests = [str(Path(__file__).parents[2]), *sys.path]
    script = (
        f"import sys; sys.path[:] = {tests}; from tests.cache import test_cache_files as it; "
        f"it.elsewhere(it.Path({str(tmp_path)!r}))"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    got = torch.load(tmp_path / "went on")
    assert [name for name in CACHES if not all(map(torch.equal, got[name], expected[name]))] == []


@pytest.fixture
def saved(tmp_path):
    """The model of a cache that was saved to the test's folder."""
    filled(mmdit()).save(tmp_path, mmdit())
    return mmdit()


def files_of(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_saving_again_writes_what_is_new(tmp_path):
    model = mmdit()
    cache = filled(model)
    cache.save(tmp_path, model)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    assert len(before) == 3
    cache.reposition([3, 50])
    cache.save(tmp_path, model)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")} == before
    shoot(model, cache, 3)
    cache.append(IDS[3])
    cache.save(tmp_path, model)
    after = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    assert len(after) == 4
    assert before.items() <= after.items()
    assert known(KVCache.load(tmp_path, model)) == known(cache)


def test_a_full_disk_loses_nothing(tmp_path):
    """Whichever write it is that fails: the cache goes on, and what was saved before is as it was."""
    model = mmdit()
    cache = filled(model)
    cache.save(tmp_path, model)
    before, old = files_of(tmp_path), known(cache)
    cache.drop(IDS[1])
    for i in (3, 4):
        shoot(model, cache, i)
        cache.append(IDS[i])
    new = known(cache)
    for writes in range(4):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", failing_after(writes, os.replace))
            if writes == 3:  # two shots and the index
                cache.save(tmp_path, model)
                break
            with pytest.raises(OSError, match="the disk is full: it needs"):
                cache.save(tmp_path, model)
        assert known(cache) == new
        assert files_of(tmp_path) == before
        assert known(KVCache.load(tmp_path, model)) == old
    assert known(KVCache.load(tmp_path, model)) == new
    assert len(files_of(tmp_path)) == 5


def test_what_a_killed_save_left_is_cleared_by_the_next(tmp_path, saved):
    """And nothing that is anybody else's, or that another cache of this process reads still."""
    cache, reader = (KVCache.load(tmp_path, saved) for _ in range(2))
    whole = min(in_use(tmp_path)).read_bytes()
    left = [tmp_path / f"e-0123456789ab.safetensors{end}" for end in ("", ".partial")]
    others = [tmp_path / name for name in ("notes.txt", "shot.safetensors", "shot-1.safetensors.bak")]
    for file in (*left, *others):
        file.write_bytes(whole)
    cache.drop(IDS[1])
    cache.save(tmp_path, saved)
    assert known(KVCache.load(tmp_path, saved)) == known(cache)
    assert len(in_use(tmp_path)) == 2
    reader.select([IDS[1]])
    shoot(saved, reader, 3)
    del reader
    gc.collect()
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "index.json", *in_use(tmp_path)])


def in_use(folder):
    """The files that a saved cache's index names."""
    return {folder / shot["file"] for shot in read_json(folder / "index.json")["caches"]["history"]["shots"]}


def failing_after(times, function):
    """The function, so many times, and then a full disk."""
    left = iter(range(times))

    def maybe(*args):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*args)

    return maybe


def pickled(_):
    return pickle.dumps({"k": Trap()})


def flipped(content):
    place = len(content) * 2 // 3
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


BROKEN = {"truncated": lambda content: content[:-5], "emptied": lambda _: b"", "flipped": flipped, "pickled": pickled}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("which", range(3))
def test_a_broken_shot_is_refused(tmp_path, saved, which, change):
    file = sorted(tmp_path.rglob("*.safetensors"))[which]
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=f"^{file}: truncated or edited since it was written: its SHA-256 is"):
        KVCache.load(tmp_path, saved)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"{file}: no such file; restore it from a copy"):
        KVCache.load(tmp_path, saved)
    assert Trap.sprung == []


def test_a_broken_index_is_refused(tmp_path, saved):
    index = tmp_path / "index.json"
    text = index.read_text()
    index.write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=f"^{index}: truncated, edited, or not written by this library"):
        KVCache.load(tmp_path, saved)
    index.write_text(re.sub(r'"origin": \d+', '"origin": 77', text))
    with pytest.raises(ValueError, match=f"^{index}: edited since it was written"):
        KVCache.load(tmp_path, saved)
    index.unlink()
    with pytest.raises(FileNotFoundError, match=f"{index}: no such file"):
        KVCache.load(tmp_path, saved)


def rewritten(folder, change):
    """The index of a saved cache, changed by somebody who knows how it is written."""
    content = read_json(folder / "index.json")
    change(content)
    write_json(folder / "index.json", content)


def test_another_layout_version_is_refused(tmp_path, saved):
    rewritten(tmp_path, lambda content: content.update(version=2))
    with pytest.raises(
        ValueError, match=f"^folder: {tmp_path} has layout version 2, expected 1; read it with the version"
    ):
        KVCache.load(tmp_path, saved)
    rewritten(tmp_path, lambda content: content.update(format="another"))
    with pytest.raises(ValueError, match="is not that of a saved KV cache"):
        KVCache.load(tmp_path, saved)


def test_a_pickle_that_the_index_vouches_for_is_not_opened(tmp_path, saved):
    file = min(tmp_path.rglob("*.safetensors"))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_bytes(pickled(b""))
    index = json.dumps(read_json(tmp_path / "index.json"))
    write_json(tmp_path / "index.json", json.loads(index.replace(digest, hashlib.sha256(pickled(b"")).hexdigest())))
    with pytest.raises(ValueError, match=f"^{file}: truncated, edited, or no safetensors file"):
        KVCache.load(tmp_path, saved)
    assert Trap.sprung == []


@pytest.mark.parametrize(("wrote", "reads", "message"), DIFFERENT.values(), ids=DIFFERENT)
def test_a_cache_of_another_model_is_refused(tmp_path, wrote, reads, message):
    filled(wrote()).save(tmp_path, wrote())
    with pytest.raises(ValueError, match=f"^model: its {message}"):
        KVCache.load(tmp_path, reads())
    assert known(KVCache.load(tmp_path, wrote())) == known(filled(wrote()))


def test_a_file_in_the_place_of_the_folder(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    cache = filled(mmdit(), budget=Budget(folder=file))
    for write in (
        partial(cache.save, file, mmdit()),
        partial(cache.save, file / "saved", mmdit()),
        partial(cache.move, IDS[0], tier="disk"),
    ):
        with pytest.raises(
            NotADirectoryError, match=f"{file}.*: there is a file in the place of a folder; use another"
        ):
            write()
    assert known(cache) == known(filled(mmdit()))
    assert file.read_text() == "mine"


@pytest.mark.parametrize("id", [1.5, None, frozenset("a"), ("a", 2.0)])
def test_ids_that_json_cannot_say(tmp_path, id):
    model, cache = mmdit(), KVCache()
    shoot(model, cache, 0)
    cache.append(id)
    with pytest.raises(
        ValueError, match=r"^ids: .* can't be saved, expected strings, whole numbers, or tuples of them"
    ):
        cache.save(tmp_path / "saved", model)
    assert not (tmp_path / "saved").exists()


def test_a_loaded_cache_takes_no_memory_until_it_is_used(tmp_path, saved):
    loaded = KVCache.load(tmp_path, saved)
    assert {entry.tier for entry in loaded.held} == {"disk"}
    assert loaded.nbytes == loaded.bytes_by_tier["device"] == loaded.bytes_by_tier["host"] == 0
    tokens, model = sum(shot.tokens for shot in SHOTS[:3]), saved.backbone
    assert loaded.bytes_by_tier["disk"] == 2 * 4 * tokens * model.heads * model.head_dim * len(model.blocks)
    shoot(saved, loaded, 3)
    assert loaded.nbytes > 0
