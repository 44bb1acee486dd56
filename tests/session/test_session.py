"""A session on disk: what it makes is the director's."""

import errno
import os
from dataclasses import replace

import pytest
import torch

import lct_core as lct
import lct_core.session.export
from lct_core import generation
from lct_core.cache import Budget
from lct_core.data import read_image, read_scene, read_video, write_image, write_video
from lct_core.generation import Director, Take
from lct_core.session import Session
from tests.session.films import CODEC, MODEL, SCRIPT, SIZE, create, guidance, kept, made, make, reopen, same, scene_of

# --- what is made ---


def test_a_session_that_keeps_all_is_the_causal_mode(tmp_path):
    session = create(tmp_path / "s", seed=3, t_c=300.0, window=2)
    for _ in range(3):
        kept(session)
    expected = generation.causal(
        MODEL, scene_of(3, seed=3), t_c=300.0, history=generation.recent(2), seed=3, steps=2, guidance=guidance()
    )
    assert same(session.latents, expected[1:])


def test_takes_of_every_kind_are_the_directors(tmp_path):
    """Five shots: two together, one from a chosen history, one that goes on without a cut, one recomputed."""
    session = create(tmp_path / "s")
    kept(session, 1, 2)
    kept(session, history=[2], t_c=500.0, seed=4)
    kept(session, prompt="The wall moves.", continues=True)
    kept(session, 5, prompt="A plain wall.", history=[1, 4], cached=False)

    director = Director(MODEL, scene_of(5), guidance=guidance(), steps=2)
    scene = [*director.scene]
    noise = scene_of(3, seed=4)[3].latents
    revised = {
        3: replace(scene[3], latents=noise),
        4: replace(scene[4], text=CODEC.text("The wall moves.")[None]),  # without [SHOT CUT]
        5: replace(scene[5], text=CODEC.text("[SHOT CUT] A plain wall.")[None]),
    }
    for i, shot in revised.items():
        director.revise(i, shot)
    takes = [Take((1, 2)), Take((3,), (2,)), Take((4,), (1, 2, 3)), Take((5,), (1, 4), cached=False)]
    for take in takes:
        director.keep(director.shoot(take), take, t_c=500.0 if take.shots == (3,) else None)
    assert same(session.latents, director.done)
    assert [row.history for row in session.shots] == [(), (), (2,), (1, 2, 3), (1, 4)]
    assert [row.t_c for row in session.shots] == [100.0, 100.0, 500.0, 100.0, 100.0]


def test_the_same_words_give_the_same_take_and_redo_another(tmp_path):
    session = create(tmp_path / "s")
    first, again = session.generate(), session.generate()
    assert same(made(session, first), made(session, again))
    redone = session.redo()
    other = session.redo(seed=5)
    as_told = session.generate(seed=5)
    assert same(made(session, other), made(session, as_told))
    takes = [made(session, take)[0] for take in (first, redone, other)]
    assert not any(torch.equal(takes[i], takes[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert (redone.seed, redone.draw, other.seed, other.draw) == (0, 1, 5, 0)


def test_a_given_image_and_a_given_clip(tmp_path):
    image, clip = torch.rand(3, 1, 32, 48), torch.rand(3, 2, 32, 32)
    write_image(tmp_path / "hero.png", image)
    write_video(tmp_path / "place.mp4", clip, fps=12)
    session = create(tmp_path / "s")
    session.give(1, tmp_path / "hero.png")
    session.give(2, tmp_path / "place.mp4", t_c=300.0)
    (tmp_path / "place.mp4").unlink()  # a copy is kept
    session = reopen(session)
    kept(session)

    director = Director(MODEL, scene_of(3), guidance=guidance(), steps=2)
    frames = [read_image(tmp_path / "hero.png"), read_video(tmp_path / "s" / "takes" / "0002" / "given.mp4")]
    for i, (shot, level) in enumerate(zip(frames, (100.0, 300.0), strict=True), start=1):
        latents = CODEC.encode(shot)[None]
        noise = lct.shot_noise(latents.shape, seed=0, step=0, scene=0, shot=i - 1)
        director.revise(i, replace(director.scene[i], latents=noise))
        director.give(i, latents, t_c=level)
    take = Take((3,), (1, 2))
    director.keep(director.shoot(take), take)
    assert same(session.latents, director.done)
    assert [row.state for row in session.shots] == ["given", "given", "kept"]
    session.give(3, tmp_path / "hero.png")
    with pytest.raises(ValueError, match="redo: take 4 was given"):
        session.redo()


def test_what_is_to_be_seen(tmp_path):
    session = create(tmp_path / "s")
    kept(session)
    session.generate(prompt="The wall moves.")
    sheet, video = session.look()
    frames = read_video(video)
    assert (frames - CODEC.decode(made(session, session.present)[0][0])).mean((2, 3)).abs().max() < 0.02
    assert read_image(sheet).shape[3] > 300  # shot 1, and shot 2
    session.keep()
    folder, *views = session.scene()
    assert [view.name for view in views] == ["contact_sheet.png", "scene.mp4"]
    assert all(view.is_file() for view in views)
    scene = read_scene(folder)
    assert scene.script.shot_prompts() == ("[SHOT CUT] A red square.", "[SHOT CUT] The wall moves.")
    assert scene.script.global_prompt() == SCRIPT.global_prompt()
    kept(session)
    session.scene()  # in place of the older one
    assert len(read_scene(folder).shots) == 3
    with pytest.raises(FileExistsError, match="already holds a scene"):
        session.scene(folder)


def test_a_full_disk_leaves_no_half_pictures(tmp_path, monkeypatch):
    session = create(tmp_path / "s", steps=1)
    kept(session)
    session.scene()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = {path.name for path in (tmp_path / "s").iterdir()}
    monkeypatch.setattr(lct_core.session.export, "write_views", full)
    with pytest.raises(OSError, match="No space left on device"):
        session.scene()
    assert {path.name for path in (tmp_path / "s").iterdir()} == before
    assert len(read_scene(tmp_path / "s" / "scene").shots) == 1
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"\.mp4: can't be written \(No space left on device\); all takes are whole"):
        session.look()
    assert [path.name for path in (tmp_path / "s" / "takes" / "0001").iterdir()] == ["latents.safetensors"]


# --- on and off the disk ---


def test_quantised_keys_and_a_budget(tmp_path):
    """Storage is the session's, and changes what is seen; a budget is the machine's, and changes nothing."""
    plain, int8 = create(tmp_path / "p"), create(tmp_path / "i", storage="int8")
    for session in (plain, int8):
        kept(session)
        kept(session)
        session.generate()
        session.save()
    near, far = made(plain, plain.present)[0], made(int8, int8.present)[0]
    assert not torch.equal(near, far)
    assert (near - far).abs().max() < 0.05 * near.abs().max()
    small = reopen(plain, budget=Budget(device=17_000, host=0, folder=tmp_path / "tiers"))
    assert torch.equal(made(small, small.generate())[0], near)
    own = reopen(plain, budget=Budget(device=17_000, host=0))  # its files go with the session's
    assert torch.equal(made(own, own.generate())[0], near)
    assert max(cache.bytes_by_tier["disk"] for cache in own._live._director.caches) > 0
    again = reopen(int8)
    assert torch.equal(made(again, again.generate())[0], far)


def test_experts_keep_a_history_each(tmp_path):
    high, low = make(seed=1)[0], make(seed=2)[0]
    experts = lct.Experts(high, low, boundary=0.6)
    session = Session.create(tmp_path / "s", experts, CODEC, SCRIPT, size=SIZE, steps=2, guidance=2.0)
    for _ in range(3):
        kept(session)
    expected = generation.causal(experts, scene_of(3), steps=2, guidance=guidance())
    assert same(session.latents, expected[1:])
    take = session.generate(prompt="A wall.")
    session.save()
    again = Session.open(tmp_path / "s", experts, CODEC)
    assert same(made(again, again.generate(prompt="A wall.")), made(session, take))
    with pytest.raises(ValueError, match="made with another model: model: its class differs"):
        reopen(session)


# --- what can go wrong ---


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: s.generate(5), r"shots: got 5, expected one from 1 to 3, or the next with a prompt"),
        (lambda s: s.generate(0), r"shots: got 0, expected one from 1 to 3"),
        (lambda s: s.generate(4), r"shots: 4 is after the last, expected a prompt"),
        (lambda s: s.generate(2, 3, prompt="A wall."), r"prompt: got one for shots \[2, 3\], expected a single shot"),
        (lambda s: s.generate(prompt="Character 2."), r"shots: shot 2 refers to Character 2, but the script defines"),
        (lambda s: s.generate(prompt="A zebra."), r"prompt: 'zebra' in '\[SHOT CUT\] A zebra.' is not among the words"),
        (lambda s: s.generate(1, continues=True), r"shots: shot 1 goes on from the shot before, but there is none"),
        (lambda s: s.generate(history=[2]), r"history: shot 2 not kept, expected some of \[1\]"),
        (lambda s: s.generate(history=[1, 1]), r"history: got \[1, 1\], expected every shot once"),
        (lambda s: s.generate(1, history=[1]), r"history: got shot 1 for shot 1, expected earlier ones"),
        (lambda s: s.generate(t_c=1001), r"t_c: got 1001, expected a level from 0 \(clean\) to 1000"),
        (lambda s: s.history([3]), r"history: shot 3 not kept"),
        (lambda s: s.keep(), r"keep: take 1 is kept already"),
        (lambda s: s.give(1, "none.png"), r"none.png: no such file"),
        (lambda s: s.switch("other"), r"name: got 'other', expected one of main"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_and_changes_nothing(tmp_path, call, words):
    session = create(tmp_path / "s", steps=1)
    take = kept(session)
    before = (tmp_path / "s" / "session.json").read_bytes()
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        call(session)
    assert (tmp_path / "s" / "session.json").read_bytes() == before
    assert session.present == take


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": (2, 30, 32)}, "size: frames: got 2 of 30 x 32 pixels"),
        ({"t_c": -1.0}, "t_c: got -1.0"),
        ({"steps": 0}, "steps: got 0"),
        ({"negative": "A zebra."}, "prompt: 'zebra'"),
        ({"storage": "int4"}, "storage: got 'int4'"),
        ({"shared_history": True}, "shared_history: got True, .* one history cannot serve both"),
    ],
)
def test_a_refused_session_writes_nothing(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        create(tmp_path / "s", **settings)
    assert not (tmp_path / "s").exists()


def test_a_folder_with_a_session_is_left_alone(tmp_path):
    create(tmp_path / "s")
    with pytest.raises(FileExistsError, match="already holds a session; go on with that"):
        create(tmp_path / "s")
    for name in ("takes", "cache", "scene"):
        (tmp_path / name / name).mkdir(parents=True)
        with pytest.raises(FileExistsError, match=f"{name}/{name}: is there without a session.json"):
            create(tmp_path / name)
        assert [path.name for path in (tmp_path / name).iterdir()] == [name]
    empty = create(tmp_path / "t")
    for name in ("keep", "redo", "look"):
        with pytest.raises(ValueError, match=f"{name}: there is no take"):
            getattr(empty, name)()
    with pytest.raises(ValueError, match="scene: shot 1 is not kept"):
        empty.scene()
