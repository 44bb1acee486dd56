"""Models that look servable and are not: refused by name, with a reason that is true."""

from pkgutil import resolve_name

import pytest
import torch
from diffusers import Kandinsky5Transformer3DModel

from lct_core import registry, retrofit
from lct_core.testing.tolerances import BOUNDS, error
from tests.backbones.families.case import random_model

REFUSED = {name: reason for spec in registry().backbones.values() for name, reason in spec.refuses.items()}


@pytest.mark.parametrize("name", REFUSED)
def test_each_is_refused_with_its_reason(name):
    module, _, cls = name.rpartition(".")
    kind = resolve_name(f"{module}:{cls}")  # it exists, under this name
    with pytest.raises(ValueError) as refused:
        retrofit(kind.__new__(kind))
    assert str(refused.value) == f"model: {name} cannot be served: {REFUSED[name]}"


@torch.no_grad()
def test_kandinsky_5_is_not_the_same_elsewhere():
    """RoPE is relative; but moved along the diagonal, its rounding to bfloat16 shows."""
    size = {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 10, "axes_dims": (4, 6, 4)}
    width = {"time_dim": 16, "model_dim": 28, "ff_dim": 32, "num_text_blocks": 2, "num_visual_blocks": 2}
    model, generator = random_model(Kandinsky5Transformer3DModel, **size, **width), torch.Generator().manual_seed(0)
    latents, text, pooled = (torch.randn(1, *s, generator=generator) for s in ((2, 4, 6, 4), (3, 16), (10,)))
    here, there = (
        model(
            latents,
            text,
            torch.tensor([500.0]),
            pooled,
            visual_rope_pos=[torch.arange(n) + steps for n in (2, 2, 3)],
            text_rope_pos=torch.arange(3),
            return_dict=False,
        )
        for steps in (0, 7)
    )
    assert error(there, here) > 10 * BOUNDS[torch.float32]["shifted"].absolute
