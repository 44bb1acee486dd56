"""Arguments, and the one line of a refusal, that the tests of the command line share."""

from lct_core.cli import main

PICTURES = ["coordinates.png", "attention.png", "packing.png"]
NINE = ["global:250:1x30x30", *(f"{180 + 20 * (k % 4)}:{[31, 16, 1][k % 3]}x30x{[30, 36][k % 2]}" for k in range(9))]


def refused(capsys, arguments):
    """The one line that bad input gets."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1, err
    assert err.endswith("\n")
    assert "Traceback" not in err
    assert "Usage" not in out + err
    return err.strip()


MODULE = """
    import torch
    from torch import nn
    from lct_core import registry

    def make():
        torch.manual_seed(0)
        model = registry().build("mmdit", channels=3, text_width=5, width=32, depth=2, heads=2)
        for parameter in model.parameters():  # a fresh model's gates are zero
            nn.init.normal_(parameter, std=0.2)
        return model

    def make_adapter():
        return registry().adapter(make())

    def fails():
        raise RuntimeError("no luck")

    def takes(one):
        return one

    def linear():
        return nn.Linear(1, 1)

    def make_with_codec():
        return make(), "a codec"

    def make_torn_adapter():
        adapter = make_adapter()
        adapter.example = lambda *_, **__: 1 / 0
        return adapter

    def nothing():
        return None

    class Holder:
        make = staticmethod(make)

    number = 3
"""
