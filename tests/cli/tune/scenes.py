"""Scenes and refusals that the tests of ``lct tune`` share."""

import json

import torch

from lct_core.cli import main
from lct_core.data import VideoScene, write_scene
from lct_core.script import Script, ScriptShot
from lct_core.training import load_checkpoint

FEW = ["--single-shot-steps", "2", "--steps", "4", "--causal-steps", "2", "--learning-rate", "1e-2"]
STAGES = {"single_shot": 2, "bidirectional": 4, "causal": 2}


def clip(frames, height, width, *, seed):
    """A colour that changes across the frame and in time."""
    colour = torch.rand(3, 1, 1, 1, generator=torch.Generator().manual_seed(seed))
    across, in_time = torch.linspace(-0.2, 0.2, width), torch.linspace(-0.2, 0.2, frames)[:, None, None]
    return (colour + across + in_time).clamp(0, 1).expand(3, frames, height, width)


def write_data(root, *sizes, texts=("A red square.", "The square moves.")):
    for number, shots in enumerate(sizes, 1):
        script = Script(
            shots=tuple(ScriptShot(text=text) for text in texts),
            characters={1: "a square"},
            storyline="Character 1 goes left.",
        )
        clips = tuple(clip(*size, seed=10 * number + i) for i, size in enumerate(shots))
        write_scene(root / f"scene_{number}", VideoScene(script=script, shots=clips), fps=12)
    return root


def log(out):
    """The lines of metrics.jsonl, without the seconds."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(row.pop("seconds") >= 0 for row in rows)
    return rows


def weights(path):
    return load_checkpoint(path)["model"]


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def refused(capsys, arguments):
    """The one line that bad input gets."""
    assert main(["tune", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    assert "Usage" not in out + err
    assert err.startswith("lct tune: error: ")
    return err.removeprefix("lct tune: error: ").strip()


FACTORIES = """
    import torch
    from lct_core import registry
    from lct_core.codec import LinearCodec

    WORDS = "[shot cut] character 1 a red square the moves goes left".split()

    def codec(channels=3, words=WORDS):
        return LinearCodec(mean=torch.full((768,), 0.5), components=torch.eye(768)[:channels], vocabulary=words)

    def model():
        return registry().build("mmdit", channels=3, text_width=11, width=24, depth=1, heads=2, patch=(1, 1, 1))

    def make():
        return model(), codec()

    def adapted():
        return registry().adapter(model()), codec()

    class Late(LinearCodec):
        def encode(self, frames):
            from WORDS_OF import SCALE
            return super().encode(frames) * SCALE

    def late():
        return model(), Late(**codec().state())

    class Broken(LinearCodec):
        def encode(self, frames):
            return torch.ones(2) + torch.ones(3)

    def broken_codec():
        return model(), Broken(**codec().state())

    def broken_model():
        made = model()
        made.register_forward_pre_hook(lambda *_: torch.ones(2) + torch.ones(3))
        return made, codec()

    def fails():
        raise RuntimeError("no\\nluck")

    def takes(one):
        return one

    def without_codec():
        return model()

    def wrong_codec():
        return model(), "codec"

    def wrong_way_round():
        return codec(), model()

    def unknown_model():
        return torch.nn.Linear(1, 1), codec()

    def other_channels():
        return model(), codec(channels=4)

    def other_words():
        return model(), codec(words=list("abcdefghijk"))

    def nothing():
        pass

    number = 3
"""
