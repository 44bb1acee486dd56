"""Where a command's model comes from, so that a checkpoint can say it and another command make the same."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lct_core.backbone import Backbone
from lct_core.cli.factory import call, current_folder_on_path, load
from lct_core.codec import Codec, LinearCodec, words
from lct_core.coordinates import Scheme
from lct_core.data import VideoScene
from lct_core.plugins import registry
from lct_core.scene_model import SceneModel, retrofit

Source = Mapping[str, Any]
"""``{"factory": "MODULE:FACTORY"}``, or ``{"backbone": NAME, "options": {...}, "codec": LinearCodec.state()}``."""


def make(source: Source, *, scheme: Scheme, gradient_checkpointing: bool = False) -> tuple[SceneModel, Codec]:
    """The scene model and the codec of a source.

    Raises:
        ValueError: for a factory that fails or returns anything but a model or adapter with a codec.
    """
    model, codec = _own(source["factory"]) if "factory" in source else _built(source)
    adapter = model if isinstance(model, Backbone) else None
    dit = model.model if isinstance(model, Backbone) else model
    scene_model = retrofit(
        dit,
        scheme=scheme,
        backbone=adapter,
        gradient_checkpointing=gradient_checkpointing,
        batch_shots="factory" not in source,  # a small model's time goes into many small operations
    )
    return scene_model, codec


def small_mmdit(scenes: Sequence[VideoScene], *, patch: int) -> dict[str, Any]:
    """The source of a small MMDiT on pixels, with a codec fitted to some scenes: for those who bring no model.

    Args:
        scenes: What it is to be trained on.
        patch: Pixels of its tokens' sides.
    """
    prompts = [prompt for scene in scenes for prompt in (scene.script.global_prompt(), *scene.script.shot_prompts())]
    codec = LinearCodec.fit(
        (clip for scene in scenes for clip in scene.shots),
        patch=patch,
        channels=min(32, 3 * patch * patch),
        vocabulary=words(prompts),
    )
    options = {
        "channels": codec.channels,
        "text_width": codec.text_width,
        "width": 96,
        "depth": 4,
        "heads": 4,
        "patch": [1, 1, 1],
        "theta": 100.0,
        "position_embedding": True,
    }
    return {"backbone": "mmdit", "options": options, "codec": codec.state()}


def _built(source: Source) -> tuple[nn.Module, Codec]:
    return registry().build(source["backbone"], **source["options"]), LinearCodec(**source["codec"])


def _own(name: str) -> tuple[nn.Module | Backbone, Codec]:
    with current_folder_on_path():
        made = call(load(name), name)
    if not (
        isinstance(made, tuple)
        and len(made) == 2
        and isinstance(made[0], nn.Module | Backbone)
        and isinstance(made[1], Codec)
    ):
        kinds = [type(x).__name__ for x in made] if isinstance(made, tuple) else type(made).__name__
        raise ValueError(
            f"MODULE:FACTORY: {name}() returned {kinds}, expected (model, codec): a model (nn.Module) or an adapter "
            "(lct_core.Backbone), and a codec with encode, decode, text and latent_shape (lct_core.codec.Codec)"
        )
    return made
