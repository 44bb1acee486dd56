"""Clips and refusals that the tests of ``lct generate`` share."""

import torch

from lct_core.cli import main

SIZE = (2, 24, 32)  # of the first training shot
SCRIPT = """
    Global Prompt: Character 1: a square. A plain wall.

    Shot 1. A red square.

    Shot 2. The square moves.

    Shot 3 (continues). Character 1 moves.
"""


def clip(frames, height, width, *, seed=0):
    """A colour that changes across the frame and in time."""
    colour = torch.rand(3, 1, 1, 1, generator=torch.Generator().manual_seed(seed))
    across, in_time = torch.linspace(-0.2, 0.2, width), torch.linspace(-0.2, 0.2, frames)[:, None, None]
    return (colour + across + in_time).clamp(0, 1).expand(3, frames, height, width)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def refused(capsys, arguments):
    """The one line that bad input gets."""
    assert main(["generate", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    assert "Usage" not in out + err
    assert err.startswith("lct generate: error: ")
    return err.removeprefix("lct generate: error: ").strip()
