"""A script as the scene that a generation starts from."""

from collections.abc import Sequence
from typing import Any

import torch

from lct_core.backbone import ShotInput
from lct_core.codec import Codec
from lct_core.noise import shot_noise
from lct_core.script import Script

Size = tuple[int, int, int]


@torch.no_grad()
def start_scene(
    script: Script,
    codec: Codec,
    size: Size | Sequence[Size],
    *,
    seed: int,
    scene: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[ShotInput]:
    """Encode a script's prompts and draw every shot's noise.

    Args:
        script: What is to be seen; with a global description a global shot comes first.
        codec: Encodes the prompts.
        size: Frames, height and width in pixels, for all shots or for each.
        seed: Of the noise; a shot's noise depends on it, ``scene`` and the shot's place alone.
        scene: Number of the scene, so that several scenes of one seed differ.
        device: Where to put it.
        dtype: Of texts and noise: that in which the model is called.

    Returns:
        The shots, as the modes take them.

    Raises:
        ValueError: for a number of sizes that differs from the shots', and as the codec does.
    """
    sizes: list[Any] = [size] * len(script.shots) if size and isinstance(size[0], int) else list(size)
    if len(sizes) != len(script.shots):
        raise ValueError(f"size: got {len(sizes)}, expected one, or one for each of the {len(script.shots)} shots")
    overall = script.global_prompt()
    first = [ShotInput(text=codec.text(overall)[None].to(device, dtype), role="global")] if overall else []
    return first + [
        ShotInput(
            text=codec.text(prompt)[None].to(device, dtype),
            latents=shot_noise(
                (1, *codec.latent_shape(*of_shot)), seed=seed, step=0, scene=scene, shot=i, device=device, dtype=dtype
            ),
        )
        for i, (prompt, of_shot) in enumerate(zip(script.shot_prompts(), sizes, strict=True))
    ]


@torch.no_grad()
def negative_texts(codec: Codec, *, shot: str = "", overall: str = "") -> dict[str, Any]:
    """Encoded negative prompts, as :class:`Guidance` takes them: ``Guidance(scale=7.5, **negative_texts(codec))``."""
    return {"text": codec.text(shot)[None], "global_text": codec.text(overall)[None]}
