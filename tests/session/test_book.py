"""What was made again, undone or branched."""

import random
from dataclasses import replace

import pytest
import torch

from lct_core.data import write_image
from lct_core.files import write_json
from lct_core.generation import Director, Take
from lct_core.session import Book
from tests.draws import draws
from tests.session.films import CODEC, MODEL, PROMPTS, create, guidance, kept, made, reopen, same, scene_of

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


def test_keeping_a_stale_shot_rewrites_its_keys(tmp_path):
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


@pytest.mark.parametrize("seed", range(draws(3, 100)))
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "its format is 'list', expected 'lct session 1'"),
        (
            {"format": "lct session 9"},
            "its format is 'lct session 9', expected 'lct session 1': the version that wrote",
        ),
        ({"format": "lct session 1"}, "makes no sense as a session: KeyError: 'takes'"),
    ],
)
def test_a_file_that_is_no_session(tmp_path, content, message):
    write_json(tmp_path / "session.json", content)
    with pytest.raises(ValueError, match=f"session.json: {message}"):
        Book.read(tmp_path)
