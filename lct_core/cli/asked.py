"""The model that a command is asked about, and a script's scene in its tokens."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pkgutil import resolve_name

import torch
from torch import nn

from lct_core.backbone import Backbone
from lct_core.checkpoints.factory import call, load
from lct_core.cli.user_code import current_folder_on_path
from lct_core.codec import Codec
from lct_core.layout import Layout, Shot
from lct_core.plugins import BackboneSpec, registry
from lct_core.script import Script


def refuse(given: Mapping[str, object | None], where: str, fix: str) -> None:
    """Refuse the first of some options that was given.

    Raises:
        ValueError: naming it, and what to do.
    """
    for option, value in given.items():
        if value is not None:
            raise ValueError(f"{option}: got {value} {where}; {fix}")


def adapter_of(backbone: str | None, model: str | None) -> tuple[Backbone | None, Codec | None]:
    """The adapter of a named family, without weights, or of the user's own model; and the codec that came with it.

    Args:
        backbone: ``--backbone``.
        model: ``--model``, which excludes the other; without either there is no adapter.

    Raises:
        ValueError: for both, an unknown family or one that cannot be had, and a factory that returns something else.
    """
    if backbone is not None:
        refuse({"--model": model}, "beside --backbone", "leave one of the two out")
        if backbone not in registry().backbones:
            raise ValueError(f"--backbone: got {backbone!r}, expected one of {', '.join(registry().backbones)}")
        return _default(registry().backbones[backbone]), None
    return (None, None) if model is None else _own(model)


def script_layout(
    read: Callable[[], Script], size: str | None, text: int | None, adapter: Backbone, *, asking: str
) -> Layout:
    """The scene of a script, every shot of one size.

    Args:
        read: Reads the script.
        size: ``--size``: latent frames, height and width.
        text: ``--text``: tokens of every prompt.
        adapter: Whose model makes tokens of latents.
        asking: The option that needs both.

    Raises:
        ValueError: where one of the two is missing, and for a size that makes no tokens.
    """
    if size is None or text is None:
        missing = " and ".join(name for name, value in (("--size", size), ("--text", text)) if value is None)
        raise ValueError(f"{asking}: got it without {missing}, expected both, like --size 21x60x104 --text 512")
    patch = adapter.traits.patch
    match = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", size)
    if match is None or any(int(n) % p for n, p in zip(match.groups(), patch, strict=True)):
        raise ValueError(
            f"--size: got {size!r}, expected latent frames, height and width below 100,000, multiples of the patch "
            f"{patch}, like 21x60x104"
        )
    frames, height, width = (int(n) // p for n, p in zip(match.groups(), patch, strict=True))
    script = read()
    prompt = [Shot(text, (1, height, width), "global")] if script.global_prompt() else []
    return Layout([[*prompt, *(Shot(text, (frames, height, width)) for _ in script.shots)]], adapter.traits.text_first)


def as_taken(adapter: Backbone, layout: Layout, *, given: str | None) -> Layout:
    """The same shots as a model takes them.

    Args:
        adapter: The model's.
        layout: The shots.
        given: What told their token counts; None for a script's, which ``--size`` and ``--text`` did.

    Raises:
        ValueError: where it takes none such.
    """
    traits, model = adapter.traits, type(adapter.model).__name__
    least, most = traits.text_tokens
    for shot in layout.shots:
        if shot.text < least or (most is not None and shot.text > most):
            wanted = f"{least}" if most == least else f"{least} or more" if most is None else f"{least} to {most}"
            raise ValueError(
                f"{given or '--text'}: got {shot.text} text tokens, expected {wanted}, as {model} takes them"
            )
        small = Shot(shot.text and 1, (shot.grid[0], 1, 1))
        example = adapter.example(small, batch=1, generator=torch.Generator(), dtype=torch.float32)
        frames = example.latents.shape[2] // traits.patch[0]
        if frames != shot.grid[0]:
            raise ValueError(
                f"{given or '--size'}: got {shot.grid[0]} frames, expected {frames}, as {model} takes them"
            )
    if traits.text == "joint":
        return layout
    scenes = [[replace(s, grid=(0, 0, 0)) if s.role == "global" else s for s in scene] for scene in layout.scenes]
    return Layout(scenes, layout.text_first)  # there, a global prompt has no video


def _default(spec: BackboneSpec) -> Backbone:
    """The adapter of a family's first model class, at its usual size; no weights."""
    module, _, name = spec.handles[0].rpartition(".")
    try:
        with torch.device("meta"):
            made = resolve_name(spec.build or f"{module}:{name}")(**spec.config)
        return registry().adapter(made, spec.name)
    except ImportError as error:
        library = spec.tested_with or module.partition(".")[0]
        raise ValueError(f"--backbone: {spec.name} needs its library ({library}): {error}; install it") from error
    except Exception as error:  # whatever a library does with a size of its own
        raise ValueError(
            f"--backbone: {spec.name}'s default {name} cannot be had ({type(error).__name__}: {error}); expected one "
            "that can; make the model that you want with --model MODULE:FACTORY"
        ) from error


def _own(name: str) -> tuple[Backbone, Codec | None]:
    with current_folder_on_path():
        made = call(load(name), name)
    first, *others = made if isinstance(made, tuple) and made else (made,)
    if not isinstance(first, nn.Module | Backbone):
        raise ValueError(
            f"--model: {name}() returned a {type(made).__name__}, expected a model (nn.Module) or an adapter "
            "(lct_core.Backbone), or one of them and a codec"
        )
    adapter = first if isinstance(first, Backbone) else registry().adapter(first)
    return adapter, next((x for x in others if isinstance(x, Codec)), None)
