"""A session on disk: whatever ends the process, and whatever happens to its files."""

import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lct_core as lct
from lct_core.session import Session
from tests.session.films import CODEC, MODEL, PROMPTS, create, kept, made, make, reopen, same

# --- on and off the disk ---


def test_keys_and_values_come_from_disk_or_are_written_again(tmp_path, monkeypatch):
    session = create(tmp_path / "s")
    for _ in range(3):
        kept(session)
    session.generate(prompt="A wall.")  # writes the keys of shot 3
    session.save()
    written, append = [], lct.KVCache.append

    def noted(cache, *ids, **more):
        written.extend(ids)
        append(cache, *ids, **more)

    monkeypatch.setattr(lct.KVCache, "append", noted)
    saved = reopen(session)
    from_disk = saved.generate(prompt="A wall.", seed=1)
    assert written == []
    os.rename(session.folder / "cache", tmp_path / "away")
    anew = reopen(session).generate(prompt="A wall.", seed=1)
    assert set(written) == {0, 1, 2, 3}
    assert same(made(saved, from_disk), made(saved, anew))


def test_a_saved_cache_is_not_taken_for_another_take(tmp_path):
    """Saved behind one take, then the take is replaced and the process ends."""
    session = create(tmp_path / "s")
    kept(session)
    session.generate()
    session.save()
    kept(session, 1, prompt="The wall moves.")
    session = reopen(session)
    fresh = create(tmp_path / "t")
    kept(fresh, prompt="The wall moves.")
    assert same(made(session, session.generate(2)), made(fresh, fresh.generate(2)))


@pytest.mark.parametrize("before", [False, True])
def test_saving_that_is_cut_short_costs_a_pass(tmp_path, monkeypatch, before):
    """Between the files of the two branches: they are of no use, and what an older saving said holds no more."""
    session = create(tmp_path / "s")
    kept(session)
    take = session.generate()
    if before:
        session.save()
        kept(session, 1, prompt="The wall moves.")
        session.generate(2)
    save = lct.KVCache.save

    def cut_short(cache, *arguments):
        save(cache, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lct.KVCache, "save", cut_short)
        with pytest.raises(KeyboardInterrupt):
            session.save()
    session = reopen(session)
    for _ in range(3 if before else 0):
        session.undo()
    assert session.kept == {1: 1}
    assert same(made(session, session.generate(2)), made(session, take))


def test_an_interrupted_take_leaves_nothing(tmp_path):
    session, whole = create(tmp_path / "s"), create(tmp_path / "t")
    for each in (session, whole):
        kept(each)

    def interrupt(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.generate(callback=interrupt)
    assert session.present.number == 1
    assert same(made(session, session.generate()), made(whole, whole.generate()))


def film(session, stop=20, *, at=None, die=None):
    """Twenty shots, one after the other; ends the process at a shot, where told to."""
    for n in range(session.next, stop + 1):
        callback = die if n == at else None
        kept(session, n, prompt=PROMPTS[n % 4], callback=callback)
        if n % 6 == 0:
            session.save()


#: Where the three kills fall: one draw for every run of the tests, many more for ``make prove``.
KILLS = [0, *(pytest.param(seed, marks=pytest.mark.prove) for seed in range(1, 20))]


@pytest.mark.parametrize("seed", KILLS)
def test_a_killed_process_loses_nothing(tmp_path, seed):
    """A process that kills itself during a step, one between the latents and the record, one after the record."""
    whole = create(tmp_path / "whole", steps=1, guidance=1.0)
    film(whole)
    rng = random.Random(seed)
    shots = sorted(rng.sample(range(2, 20), 3))
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
import torch
torch.set_num_threads({torch.get_num_threads()})
from tests.session.test_archive import CODEC, MODEL, Session, create, film
from lct_core.session import Book

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def during_a_step(session, shot):
    film(session, at=shot, die=die)

def before_the_record(session, shot):
    film(session, stop=shot - 1)
    Book.write = die
    film(session)

def after_the_record(session, shot):
    film(session, stop=shot - 1)
    session.generate(shot, prompt="Character 1.")
    die()

folder = {str(tmp_path / "killed")!r}
create(folder, steps=1, guidance=1.0)
for how, shot in zip((during_a_step, before_the_record, after_the_record), {shots}):
    child = os.fork()
    if not child:
        try:
            how(Session.open(folder, MODEL, CODEC), shot)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, how
    print(how.__name__, Session.open(folder, MODEL, CODEC).next, flush=True)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0, ran.stderr
    names = ("during_a_step", "before_the_record", "after_the_record")
    assert ran.stdout.split() == [part for pair in zip(names, map(str, shots), strict=True) for part in pair]
    session = Session.open(tmp_path / "killed", MODEL, CODEC)
    film(session)
    assert list(session.latents) == [*range(1, 21)]
    assert same(session.latents, whole.latents)


# --- what can go wrong ---


@pytest.mark.parametrize("what", ["latents", "record"])
def test_a_full_disk_leaves_the_session_as_it_was(tmp_path, monkeypatch, what):
    session, whole = create(tmp_path / "s"), create(tmp_path / "t")
    for each in (session, whole):
        kept(each)
    before = (tmp_path / "s" / "session.json").read_bytes()
    replaced = os.replace

    def full(source, target):
        if str(target).endswith({"latents": "latents.safetensors", "record": "session.json"}[what]):
            raise OSError(errno.ENOSPC, "No space left on device")
        replaced(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match=r"the disk is full: it needs [0-9]+ bytes, and [0-9]+ are free"):
            session.generate()
    assert (tmp_path / "s" / "session.json").read_bytes() == before
    assert not [*tmp_path.rglob("*.partial*")]
    assert session.present.number == 1
    expected = made(whole, whole.generate())
    assert same(made(session, session.generate()), expected)
    session = reopen(session)
    session.undo()
    assert same(made(session, session.generate()), expected)


def test_nothing_is_pickled(tmp_path):
    session = create(tmp_path / "s")
    kept(session)
    session.generate()
    session.look()
    session.save()
    kinds = {path.suffix for path in (tmp_path / "s").rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors", ".png", ".mp4"}


def test_another_model_is_refused(tmp_path):
    create(tmp_path / "s")
    for other, words in ((make(seed=1), "weights differ"), (make(width=48), "number of parameters differs")):
        with pytest.raises(ValueError, match=rf"s: made with another model: model: its {words}"):
            Session.open(tmp_path / "s", *other)


def test_a_damaged_session_says_what_is_wrong(tmp_path):
    session = create(tmp_path / "s")
    kept(session)
    path = tmp_path / "s" / "session.json"
    text = path.read_text()
    edited = json.loads(text)
    edited["content"]["branch"] = "other"
    for content, words in (
        (text[: len(text) // 2], r"session.json: truncated, .*line [0-9]+"),
        (json.dumps(edited), "session.json: edited since it was written"),
        ("[]", "session.json: truncated"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=words):
            reopen(session)
    path.write_text(text)
    latents = tmp_path / "s" / "takes" / "0001" / "latents.safetensors"
    whole = latents.read_bytes()
    latents.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"0001/latents.safetensors: .*edited since it was written"):
        reopen(session).generate()
    latents.unlink()
    with pytest.raises(FileNotFoundError, match=r"0001/latents.safetensors: no such file"):
        reopen(session).generate()
    with pytest.raises(FileNotFoundError, match="expected a session's folder"):
        Session.open(tmp_path, MODEL, CODEC)


def test_a_damaged_cache_says_how_to_go_on(tmp_path):
    session = create(tmp_path / "s")
    kept(session)
    take = session.generate()
    session.save()
    for file in (tmp_path / "s" / "cache" / "positive").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"if its files are damaged, remove .*cache: what it held is made again"):
        reopen(session).generate()
    os.rename(tmp_path / "s" / "cache", tmp_path / "away")
    session = reopen(session)
    assert same(made(session, take), made(session, session.generate()))


def test_two_at_once_do_not_undo_each_other(tmp_path):
    one = create(tmp_path / "s")
    two = reopen(one)
    kept(one)
    for call in (two.generate, two.save, lambda: two.branch("b")):
        with pytest.raises(ValueError, match=r"session.json: written by another session since this one was opened"):
            call()
    assert reopen(one).kept == {1: 1}


def test_a_take_that_ends_later_does_not_overwrite_anothers(tmp_path):
    """Two make take 1 at the same time, of different noise."""
    one = create(tmp_path / "s")
    two = reopen(one)
    with pytest.raises(ValueError, match=r"session.json: written by another session since this one was opened"):
        two.generate(seed=1, callback=lambda step: one.present or one.generate())
    again = reopen(one)
    assert same(made(again, again.present), made(one, one.generate()))
