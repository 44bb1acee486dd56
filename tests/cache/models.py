"""Models that caches are saved and read with."""

import math
from functools import partial
from typing import ClassVar

import torch

from lct_backbones.mmdit import tiny
from lct_core import retrofit
from tests.toys import CROSS, toy

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


class Trap:
    """Unpickled, it does what no file should."""

    sprung: ClassVar[list] = []

    def __reduce__(self):
        return self.sprung.append, (1,)


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


DIFFERENT = {
    "class": (
        mmdit,
        other,
        r"class differs: it was written by 'MMDiT', this is 'Toy'; use a model of the class",
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
        r"weights differ: other weights of this class wrote it; use the checkpoint that did$",
    ),
}
