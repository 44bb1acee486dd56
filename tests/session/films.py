"""A model, a codec and a film that the tests of sessions share."""

from dataclasses import replace

import torch

import lct_core as lct
from lct_core.codec import LinearCodec
from lct_core.generation import Guidance, negative_texts, start_scene
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
