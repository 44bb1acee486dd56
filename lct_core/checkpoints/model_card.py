"""What a checkpoint says of its model, so that another command makes the same one and uses it in the same way."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from lct_core.backbone import Backbone
from lct_core.checkpoints.factory import call, load
from lct_core.codec import Codec, LinearCodec, words
from lct_core.coordinates import Scheme, check_scheme
from lct_core.data import VideoScene
from lct_core.plugins import registry
from lct_core.scene_model import SceneModel, retrofit

Source = Mapping[str, Any]
"""``{"factory": "MODULE:FACTORY"}``, or ``{"backbone": NAME, "options": {...}, "codec": LinearCodec.state()}``."""

_SOURCES = ({"factory"}, {"backbone", "options", "codec"})
_CODEC = {"mean", "components", "vocabulary", "length"}


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelCard:
    """What a checkpoint says of its model: :meth:`state` is for ``about`` of :func:`lct_core.training.tune`.

    Args:
        source: Where the model and its codec come from.
        scheme: Coordinates that it was tuned with.
        size: Frames, height and width of the first training shot.
        area: Pixels per frame that videos were shrunk to, see :func:`lct_core.data.read_video`.
        multiple: What their height and width are a multiple of.
        fps: Frames per second that they were sampled at.
        max_frames: Most frames of a shot.

    Raises:
        ValueError: naming the field, for a value that makes no sense.
    """

    source: Source
    scheme: Scheme
    size: Sequence[int]
    area: int
    multiple: int
    fps: float
    max_frames: int

    def __post_init__(self) -> None:
        _check_source(self.source)
        check_scheme(self.scheme)
        if not (isinstance(self.size, list | tuple) and len(self.size) == 3 and all(map(_is_count, self.size))):
            raise ValueError(f"size: got {self.size!r}, expected frames, height and width, like [4, 64, 64]")
        for name in ("area", "multiple", "max_frames"):
            if not _is_count(getattr(self, name)):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected an int of at least 1")
        if not (isinstance(self.fps, int | float) and self.fps > 0):
            raise ValueError(f"fps: got {self.fps!r}, expected a positive number of frames per second")

    @classmethod
    def from_state(cls, about: Mapping[str, Any], path: Path) -> "ModelCard":
        """The card that a checkpoint keeps, whatever it keeps beside it.

        Args:
            about: What stands under that name in the checkpoint.
            path: The checkpoint, for the error.

        Raises:
            ValueError: where something is missing, or makes no sense.
        """
        names = [field.name for field in fields(cls)]
        if missing := [name for name in names if name not in about]:
            raise ValueError(
                f"{path}: does not say its model's {', '.join(missing)}, expected a file of lct tune or lct demo; "
                "lct_core.training.tune keeps what it gets as about=lct_core.checkpoints.ModelCard(...).state()"
            )
        try:
            return cls(**{name: about[name] for name in names})
        except ValueError as error:
            raise ValueError(f"{path}: what it says of its model makes no sense: {error}") from error

    def state(self) -> dict[str, Any]:
        """What :meth:`from_state` makes the same card of: tensors, numbers, strings, lists and dicts."""
        return {"source": dict(self.source), "scheme": self.scheme, "size": list(self.size), **self.reading}

    @property
    def reading(self) -> dict[str, Any]:
        """How its videos are read: arguments of ``SceneFolders`` and ``read_video``."""
        return {"area": self.area, "multiple": self.multiple, "fps": self.fps, "max_frames": self.max_frames}

    @property
    def factory(self) -> str | None:
        """``MODULE:FACTORY`` of a user's own model; None for one of a backbone family."""
        return self.source.get("factory")

    @property
    def name(self) -> str:
        """What to call the model."""
        return self.factory or f"the {self.source['backbone']} that it describes"

    def build(self, *, gradient_checkpointing: bool = False) -> tuple[SceneModel, Codec]:
        """Make the scene model, with new weights, and the codec. A factory's module must be in reach of ``import``.

        Args:
            gradient_checkpointing: See :func:`lct_core.retrofit`.

        Raises:
            ValueError: for a factory that fails or returns anything but a model or adapter with a codec.
        """
        model, codec = _built(self.source) if self.factory is None else _own(self.factory)
        adapter = model if isinstance(model, Backbone) else registry().adapter(model)
        scene_model = retrofit(
            adapter.model,
            backbone=adapter,
            scheme=self.scheme,
            text="own" if adapter.traits.text == "joint" else "own_and_global",  # scripts have a global prompt
            gradient_checkpointing=gradient_checkpointing,
            batch_shots=self.factory is None,  # a small model's time goes into many small operations
        )
        return scene_model, codec


def fit_codec(*data: Sequence[VideoScene], patch: int) -> LinearCodec:
    """Fit a codec to all scenes of some data sets, and let it know every word of their scripts.

    Goes through the scenes twice, and holds one at a time.

    Args:
        data: What is to be trained on.
        patch: Pixels of a patch's side; height and width of all frames are multiples of it.
    """
    scripts = (scene.script for scene in chain(*data))
    prompts = (prompt for script in scripts for prompt in (script.global_prompt(), *script.shot_prompts()))
    vocabulary = words(prompts)
    clips = (clip for scene in chain(*data) for clip in scene.shots)
    return LinearCodec.fit(clips, patch=patch, channels=min(32, 3 * patch * patch), vocabulary=vocabulary)


def small_mmdit(codec: LinearCodec, *, width: int = 96, depth: int = 4, heads: int = 4) -> dict[str, Any]:
    """The source of a small MMDiT on a codec's latents: for those who bring no model.

    Args:
        codec: Encodes its pictures and prompts.
        width: Channels of a token (ours).
        depth: Blocks (ours).
        heads: Attention heads (ours).
    """
    options = {
        "channels": codec.channels,
        "text_width": codec.text_width,
        "width": width,
        "depth": depth,
        "heads": heads,
        "patch": [1, 1, 1],
        "theta": 100.0,  # a scene of small shots is tens of positions long
        "position_embedding": True,
    }
    return {"backbone": "mmdit", "options": options, "codec": codec.state()}


def _built(source: Source) -> tuple[nn.Module, Codec]:
    return registry().build(source["backbone"], **source["options"]), LinearCodec(**source["codec"])


def _own(name: str) -> tuple[nn.Module | Backbone, Codec]:
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


def _check_source(source: Source) -> None:
    names = set(source) if isinstance(source, Mapping) else set()
    if names not in _SOURCES:
        got = sorted(map(str, names)) if names else repr(source)
        raise ValueError(f"source: got {got}, expected a dict with {' or '.join(map(str, map(sorted, _SOURCES)))}")
    if not isinstance(source.get("factory", source.get("backbone")), str):
        raise ValueError(f"source: got {sorted(names)}, expected a string for factory or backbone")
    codec = source.get("codec", dict.fromkeys(_CODEC))
    if not isinstance(codec, Mapping) or set(codec) != _CODEC or not isinstance(source.get("options", {}), Mapping):
        raise ValueError(f"source: expected options as a dict, and a codec with {sorted(_CODEC)}: LinearCodec.state()")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
