"""A session on disk: what it makes is the director's, whatever is undone, and whatever ends the process."""

import errno
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lct_core as lct
import lct_core.cli.tuned
from lct_core import generation
from lct_core.cache import Budget
from lct_core.codec import LinearCodec
from lct_core.data import read_image, read_scene, read_video, write_image, write_video
from lct_core.generation import Director, Guidance, Take, negative_texts, start_scene
from lct_core.script import Script, ScriptShot
from lct_core.session import Session

WORDS = ["[shot", "cut]", "character", "1", "a", "red", "square", "the", "moves", "plain", "wall"]
SIZE = (2, 32, 32)
SCRIPT = Script(
    shots=tuple(ScriptShot(text=text) for text in ("A red square.", "The square moves.", "Character 1 moves.")),
    description="Character 1: a square. A plain wall.",
)
PROMPTS = ["A red square.", "The wall moves.", "Character 1.", "A plain wall moves."]


def make(seed=0, width=24):
    """A tiny model of random weights, and a codec."""
    torch.manual_seed(seed)
    dit = lct.registry().build(
        "mmdit", channels=3, text_width=len(WORDS), width=width, depth=2, heads=2, patch=(1, 1, 1)
    )
    for weight in dit.parameters():
        weight.data = 0.2 * torch.randn(weight.shape)
    codec = LinearCodec(mean=torch.full((768,), 0.5), components=torch.eye(768)[:3], vocabulary=WORDS)
    return lct.retrofit(dit.eval()), codec


MODEL, CODEC = make()


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch):
    """A process that is killed leaves what it wrote with the system: fsync is for a loss of power."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def create(folder, script=SCRIPT, **settings):
    return Session.create(folder, MODEL, CODEC, script, **{"size": SIZE, "steps": 2, "guidance": 2.0, **settings})


def reopen(session, **settings):
    return Session.open(session.folder, MODEL, CODEC, **settings)


def made(session, take):
    """The latents of a take, shot by shot."""
    return [session._archive.latents(take, n) for n in take.shots]


def same(a, b):
    a, b = ([x[n] for n in sorted(x)] if isinstance(x, dict) else x for x in (a, b))
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def kept(session, *arguments, **settings):
    """Generate, and keep."""
    take = session.generate(*arguments, **settings)
    session.keep()
    return take


def scene_of(count, *, seed=0):
    """The library's own scene of a script of so many shots."""
    texts = [shot.text for shot in SCRIPT.shots] + ["A plain wall moves."] * (count - 3)
    script = replace(SCRIPT, shots=tuple(ScriptShot(text=text) for text in texts))
    return start_scene(script, CODEC, SIZE, seed=seed)


def guidance(scale=2.0):
    return Guidance(scale=scale, **negative_texts(CODEC))


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
    monkeypatch.setattr(lct_core.cli.tuned, "write_views", full)
    with pytest.raises(OSError, match="No space left on device"):
        session.scene()
    assert {path.name for path in (tmp_path / "s").iterdir()} == before
    assert len(read_scene(tmp_path / "s" / "scene").shots) == 1
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"\.mp4: can't be written \(No space left on device\); all takes are whole"):
        session.look()
    assert [path.name for path in (tmp_path / "s" / "takes" / "0001").iterdir()] == ["latents.safetensors"]


# --- histories, undo, branches ---


def test_what_was_replaced_makes_stale_what_saw_it(tmp_path):
    session = create(tmp_path / "s")
    kept(session)
    kept(session)
    third = kept(session, history=[1])
    fourth = kept(session, prompt="A wall.", history=[2])
    kept(session, prompt="A wall.", history=[4])
    session.redo()  # the present take is of shot 5
    kept(session, 2, prompt="The wall moves.")
    assert session.stale == (4, 5)
    assert [row.state for row in session.shots] == ["kept", "kept", "kept", "stale", "stale"]
    assert session.kept[3] == third.number
    with pytest.raises(ValueError, match=r"history: shot 4 stale, made from what was replaced since"):
        session.generate(history=[4], prompt="A wall.")
    with pytest.raises(ValueError, match="stale: shot 5 was made from shot 4, stale too"):
        session.keep(5)
    with pytest.raises(ValueError, match="stale: shot 3 is not stale"):
        session.keep(3)
    before = session.latents
    session.keep(5, 4)
    assert session.stale == ()
    assert same(session.latents, before)
    assert session.kept[4] != fourth.number
    session.undo()
    assert session.stale == (4, 5)
    session.undo()  # the keeping of shot 2
    assert session.stale == ()
    assert session.kept[4] == fourth.number


def test_a_stale_shot_that_is_kept_has_keys_behind_what_is_new(tmp_path):
    session = create(tmp_path / "s")
    kept(session)
    kept(session)
    kept(session, 1, prompt="The wall moves.")
    session.keep(2)
    take = session.generate(3, history=[2])
    director = Director(MODEL, scene_of(3), guidance=guidance(), steps=2)
    director.revise(1, replace(director.scene[1], text=CODEC.text("[SHOT CUT] The wall moves.")[None]))
    for i, n in enumerate((1, 2)):
        director.keep({n: session.latents[n]}, Take((n,), tuple(range(1, n))))
        assert i + 1 == n
    assert same(made(session, take), list(director.shoot(Take((3,), (2,))).values()))


def test_those_made_together_are_stale_together(tmp_path):
    session = create(tmp_path / "s")
    kept(session, 1, 2)
    kept(session, 2, history=[1])
    assert session.stale == ()  # shot 1 did not see shot 2
    session.undo()
    kept(session, 1)
    assert session.stale == (2,)
    both = create(tmp_path / "t", pattern="bidirectional")
    kept(both, 1, 2)
    kept(both, 2, history=[])
    assert both.stale == (1,)


def test_undo_and_branches(tmp_path):
    session = create(tmp_path / "s")
    kept(session)
    session.branch("other")
    ours = kept(session, prompt="The wall moves.")
    session.switch("main")
    assert session.kept == {1: 1}
    theirs = kept(session)
    assert not same(made(session, ours), made(session, theirs))
    assert session.branches == ("main", "other")
    session.switch("other")
    assert session.kept == {1: 1, 2: ours.number}
    session.undo()
    session.undo()
    assert session.present.number == 1
    session.undo()
    session.undo()
    with pytest.raises(ValueError, match="undo: nothing is left to undo"):
        session.undo()
    session.switch("main")
    assert session.kept == {1: 1, 2: theirs.number}
    for name in ("main", ""):
        with pytest.raises(ValueError, match=f"name: got '{name}', expected one that is not taken"):
            session.branch(name)
    with pytest.raises(ValueError, match="name: got 'third', expected one of main, other"):
        session.switch("third")


def test_the_chosen_history_is_for_takes_until_one_is_kept(tmp_path):
    session = create(tmp_path / "s")
    kept(session)
    kept(session)
    session.history([1])
    assert session.generate().history == (1,)
    assert session.redo().history == (1,)
    session.history(None)
    assert session.generate().history == (1, 2)
    session.history([])
    session = reopen(session)
    assert session.chosen == ()
    assert session.generate().history == ()
    assert session.generate(history="recent").history == (1, 2)
    session.keep()
    assert session.generate(prompt="A wall.").history == (1, 2, 3)


# --- on and off the disk ---


def random_command(rng, session):
    """A command that makes sense now; a given image is called GIVEN."""
    shots, present, stale = session.kept, session.present, session.stale
    fine = [n for n in shots if n not in stale]
    n = rng.choice([session.next, session.next, *shots])
    earlier = [i for i in fine if i < n]
    seen = rng.sample(earlier, rng.randint(0, len(earlier)))
    several = [1, 2] if rng.random() < 0.2 else [n]
    generate = ("generate", several, {"history": seen if several == [n] else []})
    if len(several) == 1:
        generate[2]["prompt"] = rng.choice(PROMPTS)
        generate[2]["cached"] = rng.random() < 0.8
    commands = [generate] * 4
    if present and shots.get(present.shots[0]) != present.number:
        commands += [("keep", [], {})] * 6
    if present and not present.file and not {*present.history} & {*stale} and all(i in shots for i in present.history):
        commands.append(("redo", [], {}))
    if stale:
        commands.append(("keep", stale, {}))
    if len(session._book.branches[session.branch_name]) > 3:
        commands += [("undo", [], {})]
    commands += [("give", [rng.choice([*shots]), "GIVEN"], {})] if shots else []
    commands += [("save", [], {}), ("branch", [f"b{len(session.branches)}"], {})]
    commands += [("switch", [rng.choice(session.branches)], {})] if len(session.branches) > 1 else []
    return rng.choice(commands)


@pytest.mark.parametrize("seed", range(3))
def test_reopened_after_every_command_it_is_the_same(tmp_path, seed):
    """Whatever is in memory follows from what is on disk: random commands, to one that is never closed and one that is
    always opened anew."""
    rng = random.Random(seed)
    write_image(tmp_path / "given.png", torch.rand(3, 1, 32, 48))
    one, two = create(tmp_path / "one", steps=1), create(tmp_path / "two", steps=1)
    for _ in range(30):
        name, arguments, settings = random_command(rng, one)
        arguments = [tmp_path / "given.png" if x == "GIVEN" else x for x in arguments]
        for session in (one, two):
            getattr(session, name)(*arguments, **settings)
        assert (one.kept, one.stale) == (two.kept, two.stale)
        two = reopen(two)
    assert len(one._book.takes) > 10
    for a, b in zip(one._book.takes, two._book.takes, strict=True):
        assert same(made(one, a), made(two, b)), f"take {a.number}"


def test_a_shot_that_goes_leaves_no_gap(tmp_path):
    """Of a selected history that the keys in the middle were dropped of, the others close up, as in a new cache."""
    session = create(tmp_path / "s")
    kept(session)
    kept(session)
    kept(session, history=[1])
    session.generate(prompt="A wall.", history=[1, 2, 3])
    session.save()
    write_image(tmp_path / "hero.png", torch.rand(3, 1, 32, 32))
    session.give(2, tmp_path / "hero.png")
    take, again = session.generate(4, prompt="A wall.", history=[1, 3]), reopen(session)
    assert same(made(session, take), made(again, again.generate(4, prompt="A wall.", history=[1, 3])))


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


def film(session, stop=20, *, at=None, die=None):
    """Twenty shots, one after the other; ends the process at a shot, where told to."""
    for n in range(session.next, stop + 1):
        callback = die if n == at else None
        kept(session, n, prompt=PROMPTS[n % 4], callback=callback)
        if n % 6 == 0:
            session.save()


def test_killed_three_times_it_is_as_if_nothing_had_happened(tmp_path):
    """A process that kills itself during a step, one between the latents and the record, one after the record."""
    whole = create(tmp_path / "whole", steps=1, guidance=1.0)
    film(whole)
    rng = random.Random(0)
    shots = sorted(rng.sample(range(2, 20), 3))
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
import torch
torch.set_num_threads({torch.get_num_threads()})
from tests.session.test_session import CODEC, MODEL, Session, create, film
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
    assert not [*tmp_path.rglob("*.partial")]
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
def test_a_session_that_can_not_be_is_refused_before_anything_is_written(tmp_path, settings, words):
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
