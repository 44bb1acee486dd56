"""A cache saved and loaded: another process goes on, and what is broken is refused."""

import errno
import gc
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from lct_core import KVCache, Shot
from lct_core.cache import Budget
from lct_core.files import read_json, write_json
from tests.cache.models import DIFFERENT, Trap, crossed, mmdit

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
        f"import sys; sys.path[:] = {tests}; from tests.cache import test_saved as it; "
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
    left = [tmp_path / f"e-0123456789ab{end}" for end in (".safetensors", ".partial.safetensors")]
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


@pytest.mark.parametrize("budget", [0, 1000, {}, ""])
def test_a_budget_that_is_none(tmp_path, saved, budget):
    with pytest.raises(ValueError, match=r"^budget: got .*, expected Budget"):
        KVCache.load(tmp_path, saved, budget=budget)


def test_a_loaded_cache_takes_no_memory_until_it_is_used(tmp_path, saved):
    loaded = KVCache.load(tmp_path, saved)
    assert {entry.tier for entry in loaded.held} == {"disk"}
    assert loaded.nbytes == loaded.bytes_by_tier["device"] == loaded.bytes_by_tier["host"] == 0
    tokens, model = sum(shot.tokens for shot in SHOTS[:3]), saved.backbone
    assert loaded.bytes_by_tier["disk"] == 2 * 4 * tokens * model.heads * model.head_dim * len(model.blocks)
    shoot(saved, loaded, 3)
    assert loaded.nbytes > 0
