"""``lct generate``: a scene from a script and a model that ``lct tune`` made."""

import re
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from lct_core.cli.options import COUNT, FPS, Finite, device, seed

_MODES = ("joint", "conditional", "autoregressive", "causal")
_VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi")


@click.command("generate")
@click.argument("script", type=click.Path(path_type=Path))
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/generate"),
    show_default=True,
    help="Folder for the shots, scene.mp4 and contact_sheet.png.",
)
@click.option(
    "--mode",
    type=click.Choice(_MODES),
    help="All shots at once; from given ones; shot after shot; the same through the KV cache.  "
    "[default: conditional with --given; else causal for a context-causal model, joint for another]",
)
@click.option(
    "--given", metavar="SHOT=FILE", multiple=True, help="A video or image that is shot SHOT, from 1; can be repeated."
)
@click.option("--steps", type=COUNT, default=32, show_default=True, help="Euler steps.")
@click.option("--guidance", type=float, default=7.5, show_default=True, help="On the texts; 1 is none.")
@click.option("--negative", default="", help="Negative prompt of the shots.  [default: empty]")
@click.option("--negative-global", default="", help="Negative global prompt.  [default: empty]")
@click.option(
    "--t-c",
    type=Finite(0, 1000),
    default=100.0,
    show_default=True,
    help="Noise level of given and of earlier shots, 0-1000.",
)
@click.option("--window", type=COUNT, default=9, show_default=True, help="Most shots that are seen, shot after shot.")
@click.option("--size", metavar="FxHxW", help="Frames, height and width.  [default: as the first training shot]")
@click.option("--fps", type=FPS, help="Of the videos.  [default: as in training]")
@device
@seed
def command(
    script: Path,
    checkpoint: Path,
    out: Path,
    mode: str | None,
    given: tuple[str, ...],
    steps: int,
    guidance: float,
    negative: str,
    negative_global: str,
    t_c: float,
    window: int,
    size: str | None,
    fps: float | None,
    device: torch.device,
    seed: int,
) -> None:
    """Generate the scene of SCRIPT with CHECKPOINT, a file that lct tune or lct demo wrote.

    Writes a scene folder, so that what was generated can be given again, with scene.mp4 and contact_sheet.png.

    \b
    Examples:
      lct generate script.txt runs/tune/bidirectional.pt --out runs/scene
      lct generate script.txt runs/tune/bidirectional.pt --given 1=hero.png --given 2=place.mp4
      lct generate script.txt runs/tune/causal.pt --t-c 300
    """
    from rich.console import Console

    from lct_core import generation
    from lct_core.cli.progress import Stages
    from lct_core.cli.sheet import SceneRows, contact_sheet
    from lct_core.cli.source import make
    from lct_core.data import VideoScene, write_scene, write_video
    from lct_core.generation.scene import negative_texts, start_scene
    from lct_core.script import read_script
    from lct_core.training import load_checkpoint

    if not isfinite(guidance):
        raise ValueError(f"--guidance: got {guidance}, expected a finite number; 1 is none")
    read = read_script(script)
    saved = load_checkpoint(checkpoint)
    if "model" not in saved:
        raise ValueError(f"{checkpoint}: a stage that is not finished, expected one of the files named like a stage")
    about = saved["about"]
    mode = _mode(mode, given=bool(given), pattern=saved["pattern"], checkpoint=checkpoint)
    model, codec = make(about["source"], scheme=about["scheme"])
    try:
        model.backbone.load_state_dict(saved["model"])
    except RuntimeError as error:
        raise ValueError(f"{checkpoint}: its weights are not of {about['source'].get('factory')}: {error}") from error
    model.backbone.to(device).eval()
    reading = {name: about[name] for name in ("area", "multiple", "fps", "max_frames")}
    clips = _given(given, shots=len(read.shots), reading=reading)
    sizes = [_size(size, about["size"])] * len(read.shots)
    for i, clip in clips.items():
        sizes[i] = (clip.shape[1], clip.shape[2], clip.shape[3])
    for frames, height, width in sizes:
        try:
            codec.latent_shape(frames, height, width)
        except ValueError as error:
            raise ValueError(f"--size: {error}") from error
        if frames > 1 and (height % 2 or width % 2):
            raise ValueError(
                f"--size: got a video of {height} x {width} pixels, expected even ones, as MP4 files need; choose "
                "another size, or an even --multiple of lct tune"
            )
    scene = start_scene(read, codec, sizes, seed=seed, device=device)
    first = len(scene) - len(read.shots)  # a global shot comes before
    latents = {first + i: codec.encode(clip)[None].to(device) for i, clip in clips.items()}
    shots = len(read.shots) - len(clips)
    guide = generation.Guidance(
        scale=guidance,
        **{
            name: text.to(device)
            for name, text in negative_texts(codec, shot=negative, overall=negative_global).items()
        },
    )
    common: dict[str, Any] = {"steps": steps, "guidance": guide}
    out.mkdir(parents=True, exist_ok=True)
    if (out / "script.txt").exists() or any(out.glob("shot_*")):
        raise FileExistsError(f"{out}: already holds a scene, so it is left alone; choose another --out")

    console = Console(highlight=False)
    loops = 1 if mode in ("joint", "conditional") else shots
    with Stages(console) as progress, progress(f"generate, {mode}", loops * steps) as advance:
        common["callback"] = lambda _: advance()
        if mode == "causal":
            result = generation.causal(model, scene, latents, t_c=t_c, history=generation.recent(window), **common)
        elif mode == "autoregressive":
            result = generation.autoregressive(
                model, scene, latents, t_c=t_c, history=generation.recent(window), pattern=saved["pattern"], **common
            )
        else:
            result = generation.conditional(model, scene, latents, t_c=t_c, pattern=saved["pattern"], **common)
    decoded = [codec.decode(z[0].cpu()) for z in result if z is not None]
    for i, clip in clips.items():
        decoded[i] = clip
    fps = fps or about["fps"]
    write_scene(out, VideoScene(script=read, shots=tuple(decoded)), fps=fps)
    written = [out / "contact_sheet.png"]
    contact_sheet(written[0], [SceneRows([shot.text for shot in read.shots], {mode: decoded})])
    if len({clip.shape[2:] for clip in decoded}) == 1 and not any(n % 2 for n in decoded[0].shape[2:]):
        written.append(out / "scene.mp4")
        write_video(written[1], torch.cat(decoded, dim=1), fps=fps)
    console.print("\n".join(map(str, (out, *written))), soft_wrap=True, markup=False)


def _mode(mode: str | None, *, given: bool, pattern: str, checkpoint: Path) -> str:
    causal = pattern == "context_causal"
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
    return mode


def _given(given: Sequence[str], *, shots: int, reading: dict[str, Any]) -> dict[int, Tensor]:
    """The given shots' frames, by their place in the script counting from 0."""
    from lct_core.data import read_image, read_video

    clips: dict[int, Tensor] = {}
    for option in given:
        match = re.fullmatch(r"([0-9]+)=(.+)", option)
        if not match or not 1 <= int(match[1]) <= shots:
            raise ValueError(f"--given: got {option!r}, expected SHOT=FILE with a shot from 1 to {shots}")
        i, path = int(match[1]) - 1, Path(match[2])
        if i in clips:
            raise ValueError(f"--given: got shot {i + 1} twice, expected each once")
        if path.suffix.lower() in _VIDEOS:
            clips[i] = read_video(path, **reading)
        else:
            clips[i] = read_image(path, area=reading["area"], multiple=reading["multiple"])
    if len(clips) == shots:
        raise ValueError(f"--given: all {shots} shots are given, expected at least one left to generate")
    return clips


def _size(size: str | None, default: Sequence[int]) -> tuple[int, int, int]:
    if size is None:
        frames, height, width = default
        return frames, height, width
    match = re.fullmatch(r"([0-9]+)x([0-9]+)x([0-9]+)", size)
    if not match:
        raise ValueError(f"--size: got {size!r}, expected frames, height and width, like 4x64x64")
    return int(match[1]), int(match[2]), int(match[3])
