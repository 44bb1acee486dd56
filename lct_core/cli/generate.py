"""``lct generate``: a scene from a script and a model that ``lct tune`` made."""

import re
from collections.abc import Mapping, Sequence
from math import lcm
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from rich.console import Console
from torch import Tensor

from lct_core import generation
from lct_core.cache import Budget, Storage
from lct_core.checkpoints import ModelCard, Tuned
from lct_core.cli.machine import seeded, usable, within_memory
from lct_core.cli.sampling import Size, parse_size, sampling_of
from lct_core.cli.user_code import current_folder_on_path, own_code
from lct_core.codec import Codec
from lct_core.data import VideoScene, write_scene
from lct_core.data.scenes import read_clip
from lct_core.pictures.scene import write_views
from lct_core.progress import Stages
from lct_core.script import read_script
from lct_core.session.archive import check_size

_LESS_MEMORY = "choose a smaller --size or --window, add --bf16, or with --mode causal set --storage or --on-device"


class _Given(NamedTuple):
    """A shot that is not to be generated: the file that it comes from, and its frames."""

    file: Path
    frames: Tensor


def run(
    *,
    script: Path,
    checkpoint: Path,
    out: Path,
    mode: str | None,
    given: tuple[str, ...],
    t_c: float | None,
    window: int | None,
    size: str | None,
    fps: float | None,
    bf16: bool,
    storage: Storage,
    device: str,
    seed: int,
    **fields: Any,
) -> None:
    """Generate a scene and write it; the arguments are the command's."""
    where = usable(device)
    read = read_script(script)
    if (out / "script.txt").exists() or any(out.glob("shot_*")):
        raise FileExistsError(f"{out}: already holds a scene, so it is left alone; choose another --out")
    tuned = Tuned.load(checkpoint)
    card, pattern, trained = tuned.card, tuned.pattern, tuned.window
    clips = _clips(given, shots=len(read.shots), reading=card.reading)
    mode = _mode(mode, given=clips, pattern=pattern, checkpoint=checkpoint)
    sampling = sampling_of(t_c=t_c, window=window or trained, storage=storage, **fields)
    _check_used(mode, t_c=t_c, window=window, storage=storage, near=sampling.budget)
    if mode in ("joint", "conditional") and len(read.shots) > trained:
        click.echo(f"note: {len(read.shots)} shots at once; the model was trained on at most {trained}", err=True)
    with (
        current_folder_on_path(),
        own_code(card.factory),
        within_memory(where, fix=_LESS_MEMORY),
        seeded(seed),  # a codec may sample
        torch.no_grad(),
    ):
        model, codec = tuned.build(where)
        sizes = _sizes(size, clips, card, codec, shots=len(read.shots))
        dtype = next(model.backbone.parameters()).dtype
        scene = generation.start_scene(read, codec, sizes, seed=seed, device=where, dtype=dtype)
        first = len(scene) - len(read.shots)  # a global shot comes before
        latents = {first + i: codec.encode(clip.frames)[None].to(where) for i, clip in clips.items()}
        sampling = sampling.encoded(codec)
        out.mkdir(parents=True, exist_ok=True)  # before hours are spent on what goes there
        make = generation.conditional if mode == "joint" else getattr(generation, mode)
        own: dict[str, Any] = {} if mode == "causal" else {"pattern": pattern}
        assert isinstance(sampling.steps, int)  # the option's
        steps = sampling.steps
        if mode in ("autoregressive", "causal"):
            own["seed"] = seed
            steps *= len(read.shots) - len(clips)
        with (
            torch.autocast(where.type, torch.bfloat16, enabled=bf16),
            Stages(Console(highlight=False)) as progress,
            progress(f"generate, {mode}", steps) as advance,
        ):
            result = make(model, scene, latents, callback=lambda _: advance(), sampling=sampling, **own)
        frames = [codec.decode(z[0].cpu()).float().cpu().clamp(0, 1) for z in result if z is not None]
    for i, clip in clips.items():
        frames[i] = clip.frames
    rate = fps or card.fps
    write_scene(out, VideoScene(script=read, shots=tuple(frames)), fps=rate)
    views = write_views(out, [shot.text for shot in read.shots], frames, label=mode, fps=rate)
    click.echo("\n".join(map(str, [out, *views])))


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
        clips[i] = _Given(file, read_clip(file, **reading))
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
        name, fix = "--size", "choose another size, for example"
        if i in given:
            frames, height, width = given[i].frames.shape[1:]
            sizes[i] = frames, height, width
            name = f"--given: {given[i].file}, of {frames} x {height} x {width} as it is read"
            fix = "crop or scale the file, for example to"
        check_size(sizes[i], codec, name=name, fix=f"; {fix} multiples of {lcm(2, card.multiple)}")
    return sizes
