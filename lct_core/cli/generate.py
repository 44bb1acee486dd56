"""``lct generate``: a scene from a script and a model that ``lct tune`` made."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor

from lct_core import generation
from lct_core.backbone.inputs import ShotInput
from lct_core.cache import Budget, KVCache, Storage
from lct_core.checkpoints.factory import current_folder_on_path, own_code
from lct_core.checkpoints.model_card import ModelCard
from lct_core.checkpoints.tuned import Tuned
from lct_core.cli.options import (
    COUNT,
    LEVEL,
    budget,
    device,
    sampling,
    seed,
    seeded,
    storage,
    tiers,
    video,
    within_memory,
)
from lct_core.cli.tuned import Size, check_free, check_size, parse_size
from lct_core.codec import Codec
from lct_core.data import VideoScene, read_image, read_video, write_scene
from lct_core.data.scenes import is_video
from lct_core.pictures.scene import write_views
from lct_core.scene_model import SceneModel
from lct_core.script import Script, read_script

_MODES = ("joint", "conditional", "autoregressive", "causal")
_LESS_MEMORY = "choose a smaller --size or --window, add --bf16, or with --mode causal set --storage or --on-device"


class _Given(NamedTuple):
    """A shot that is not to be generated: the file that it comes from, and its frames."""

    file: Path
    frames: Tensor


@click.command("generate", short_help="Generate the scene of a script.")
@click.argument("script", type=click.Path(path_type=Path))
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/generate"),
    show_default=True,
    help="Folder for script.txt, the shots, scene.mp4 and contact_sheet.png.",
)
@click.option(
    "--mode",
    type=click.Choice(_MODES),
    help="All shots at once; the same from given ones; shot after shot; the same through the KV cache.  "
    "[default: causal for a context-causal model; for another joint, or conditional with --given]",
)
@click.option(
    "--given",
    metavar="SHOT=FILE",
    multiple=True,
    help="A video or image that is shot SHOT, counted from 1; can be repeated.",
)
@sampling
@click.option(
    "--t-c",
    type=LEVEL,
    help="Noise level of given and of earlier shots, 0 to 1000.  [default: 100]",
)
@click.option(
    "--window",
    type=COUNT,
    help="Shot after shot: most shots that are seen, the current one counted.  [default: as many as in training]",
)
@video
@storage
@tiers
@device
@seed
def command(
    script: Path,
    checkpoint: Path,
    out: Path,
    mode: str | None,
    given: tuple[str, ...],
    guidance: float,
    negative: str,
    negative_global: str,
    t_c: float | None,
    window: int | None,
    size: str | None,
    fps: float | None,
    bf16: bool,
    storage: Storage,
    on_device: float | None,
    on_host: float | None,
    cache_folder: Path | None,
    device: torch.device,
    seed: int,
    **numbers: Any,
) -> None:
    """Generate the scene of SCRIPT with CHECKPOINT, a file that lct tune or lct demo wrote.

    Writes a scene folder, so that what was generated can be given again, with scene.mp4 and contact_sheet.png.

    \b
    Examples:
      lct generate script.txt runs/tune/bidirectional.pt --out runs/scene
      lct generate script.txt runs/tune/bidirectional.pt --given 1=hero.png --given 2=place.mp4
      lct generate script.txt runs/tune/causal.pt --t-c 300
    """
    read = read_script(script)
    check_free(out)
    tuned = Tuned.load(checkpoint)
    card, pattern, trained = tuned.card, tuned.pattern, tuned.window
    clips = _clips(given, shots=len(read.shots), reading=card.reading)
    mode = _mode(mode, given=clips, pattern=pattern, checkpoint=checkpoint)
    near = budget(on_device, on_host, cache_folder)
    _check_used(mode, t_c=t_c, window=window, storage=storage, near=near)
    if mode in ("joint", "conditional") and len(read.shots) > trained:
        click.echo(f"note: {len(read.shots)} shots at once; the model was trained on at most {trained}", err=True)
    with (
        current_folder_on_path(),
        own_code(card.factory),
        within_memory(device, fix=_LESS_MEMORY),
        seeded(seed),  # a codec may sample
        torch.no_grad(),
    ):
        model, codec = tuned.build(device)
        sizes = _sizes(size, clips, card, codec, shots=len(read.shots))
        dtype = next(model.backbone.parameters()).dtype
        scene = generation.start_scene(read, codec, sizes, seed=seed, device=device, dtype=dtype)
        first = len(scene) - len(read.shots)  # a global shot comes before
        latents = {first + i: codec.encode(clip.frames)[None].to(device) for i, clip in clips.items()}
        texts = generation.negative_texts(codec, shot=negative, overall=negative_global)
        numbers |= {
            "guidance": generation.Guidance(scale=guidance, **texts),
            "seed": seed,
            "t_c": 100.0 if t_c is None else t_c,
            "window": window or trained,
            "new_cache": partial(KVCache, storage=storage, budget=near),
        }
        out.mkdir(parents=True, exist_ok=True)  # before hours are spent on what goes there
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            result = _run(mode, model, scene, latents, pattern=pattern, **numbers)
        frames = [codec.decode(z[0].cpu()).float().cpu().clamp(0, 1) for z in result if z is not None]
    for i, clip in clips.items():
        frames[i] = clip.frames
    _write(out, read, frames, mode=mode, fps=fps or card.fps)


def _clips(given: Sequence[str], *, shots: int, reading: Mapping[str, Any]) -> dict[int, _Given]:
    """The given shots by their place in the script, counting from 0."""
    clips: dict[int, _Given] = {}
    for option in given:
        match = re.fullmatch(r"([0-9]+)=(.+)", option)
        if not match or not 1 <= int(match[1]) <= shots:
            raise ValueError(f"--given: got {option!r}, expected SHOT=FILE with a shot from 1 to {shots}")
        i, file = int(match[1]) - 1, Path(match[2])
        if i in clips:
            raise ValueError(f"--given: got shot {i + 1} twice, expected each once")
        if is_video(file):
            frames = read_video(file, **reading)
        else:
            frames = read_image(file, area=reading["area"], multiple=reading["multiple"])
        clips[i] = _Given(file, frames)
    if len(clips) == shots:
        raise ValueError(f"--given: all {shots} shots are given, expected at least one left to generate")
    return clips


def _mode(mode: str | None, *, given: Mapping[int, _Given], pattern: str, checkpoint: Path) -> str:
    """The mode that was asked for, or the default; refused where it does not fit the model or the given shots."""
    causal = pattern == "context_causal"
    if pattern == "own_shot" and (given or mode not in (None, "joint")):
        raise ValueError(
            f"--mode: {checkpoint} was tuned on single shots and makes each by itself; use bidirectional.pt or "
            "causal.pt"
        )
    mode = mode or ("causal" if causal else "conditional" if given else "joint")
    if mode == "causal" and not causal:
        raise ValueError(
            f"--mode: got causal, but {checkpoint} was tuned with {pattern} attention; use its causal.pt, or "
            "--mode autoregressive"
        )
    if mode == "conditional" and not given:
        raise ValueError("--mode: got conditional without a given shot; add --given SHOT=FILE, or use --mode joint")
    if mode == "joint" and given:
        raise ValueError("--mode: got joint with a given shot, expected conditional, autoregressive or causal")
    in_order = causal or mode == "autoregressive"
    if in_order and (late := [i for i in given if i >= len(given)]):
        before = next(i for i in range(len(given)) if i not in given)
        instead = "a model of bidirectional attention" if causal else "--mode conditional"
        raise ValueError(
            f"--given: got shot {late[0] + 1} without shot {before + 1}, which would be generated without seeing it; "
            f"give the first shots, or use {instead}"
        )
    return mode


def _check_used(mode: str, *, t_c: float | None, window: int | None, storage: Storage, near: Budget | None) -> None:
    """Refuse what the mode has no use for."""
    if t_c is not None and mode == "joint":
        raise ValueError(f"--t-c: got {t_c:g}, but joint generation has no given and no earlier shots; leave it out")
    if window is not None and mode in ("joint", "conditional"):
        raise ValueError(f"--window: got {window}, but {mode} generation makes all shots at once; leave it out")
    if mode != "causal" and (storage != "native" or near):
        option = "--on-device, --on-host, --cache-folder" if near else "--storage"
        raise ValueError(f"{option}: got it, but {mode} generation has no KV cache; leave it out, or use --mode causal")


def _sizes(size: str | None, given: Mapping[int, _Given], card: ModelCard, codec: Codec, *, shots: int) -> list[Size]:
    """Frames, height and width of every shot; refused where the codec cannot take them, or no file can hold them."""
    sizes = [parse_size(size, card.size)] * shots
    for i in range(shots):
        option, fix = "--size", "choose another size, for example"
        if i in given:
            frames, height, width = given[i].frames.shape[1:]
            sizes[i] = frames, height, width
            option = f"--given: {given[i].file}, of {frames} x {height} x {width} as it is read"
            fix = "crop or scale the file, for example to"
        check_size(sizes[i], card, codec, option=option, fix=fix)
    return sizes


def _run(
    mode: str,
    model: SceneModel,
    scene: Sequence[ShotInput],
    given: Mapping[int, Tensor],
    *,
    pattern: str,
    window: int,
    seed: int,
    steps: int,
    shift: float,
    new_cache: Callable[..., KVCache],
    **numbers: Any,
) -> list[Tensor | None]:
    """The latents of every shot."""
    from rich.console import Console

    from lct_core.progress import Stages

    shots = sum(shot.role != "global" for shot in scene) - len(given)
    loops = 1 if mode in ("joint", "conditional") else shots
    with Stages(Console(highlight=False)) as progress, progress(f"generate, {mode}", loops * steps) as advance:
        common = {"steps": generation.schedule(steps, shift=shift), "callback": lambda _: advance(), **numbers}
        if mode == "causal":
            common |= {"history": generation.recent(window), "seed": seed, "new_cache": new_cache}
            return generation.causal(model, scene, given, **common)
        common["pattern"] = pattern
        if mode == "autoregressive":
            return generation.autoregressive(
                model, scene, given, history=generation.recent(window), seed=seed, **common
            )
        return generation.conditional(model, scene, given, **common)


def _write(out: Path, script: Script, frames: Sequence[Tensor], *, mode: str, fps: float) -> None:
    """Write a scene folder, a contact sheet and, where all shots are of one size, one video; say where they are."""
    write_scene(out, VideoScene(script=script, shots=tuple(frames)), fps=fps)
    views = write_views(out, [shot.text for shot in script.shots], frames, label=mode, fps=fps)
    click.echo("\n".join(map(str, [out, *views])))
