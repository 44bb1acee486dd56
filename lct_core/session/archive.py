"""What is on disk of a session's takes: latents, files that were given, and what there is to look at."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lct_core.codec import Codec
from lct_core.data import read_image, read_video, write_image, write_video
from lct_core.data.scenes import read_clip
from lct_core.files import read_tensors, replacing, write_tensors
from lct_core.pictures.sheet import SceneRows, contact_sheet
from lct_core.session.book import SessionTake
from lct_core.session.settings import Settings

_LATENTS, _SHEET = "latents.safetensors", "contact_sheet.png"


class Archive:
    """The folder of a session's takes. Every file in it is whole.

    Args:
        folder: Where it is; made when the first take is.
        codec: Decodes latents.
        settings: The session's.
    """

    def __init__(self, folder: Path, codec: Codec, settings: Settings) -> None:
        self._home, self._codec, self._settings = folder, codec, settings

    def folder(self, take: SessionTake) -> Path:
        """Where a take is kept."""
        return self._home / f"{take.number:04d}"

    def write(self, take: SessionTake, latents: Mapping[int, Tensor]) -> SessionTake:
        """Write a take's latents, by shot, in float32.

        Returns:
            The take, with their digest.

        Raises:
            OSError: where they can't be written.
        """
        self.folder(take).mkdir(parents=True, exist_ok=True)
        tensors = {f"shot_{n}": z.detach().to("cpu", torch.float32) for n, z in latents.items()}
        return replace(take, digest=write_tensors(self.folder(take) / _LATENTS, tensors, {"take": str(take.number)}))

    def latents(self, take: SessionTake, n: int) -> Tensor:
        """The latents of one of a take's shots.

        Raises:
            FileNotFoundError: they are gone.
            ValueError: they were edited since they were written.
        """
        tensors, _ = read_tensors(self.folder(take) / _LATENTS, digest=take.digest)
        return tensors[f"shot_{n}"]

    def give(self, take: SessionTake, file: Path, latents: Tensor) -> SessionTake:
        """Copy the file that a take is, and write its latents; see :meth:`write`."""
        self.folder(take).mkdir(parents=True, exist_ok=True)
        _whole(self._given(take), lambda path: shutil.copyfile(file, path))
        (n,) = take.shots
        return self.write(take, {n: latents})

    def read(self, file: Path) -> Tensor:
        """The frames of a file, read as the session's settings say."""
        return read_clip(file, **self._settings.reading)

    @torch.no_grad()
    def frames(self, take: SessionTake, n: int) -> Tensor:
        """One of a take's shots, RGB in [0, 1]: of the file, where it was given, else decoded."""
        if take.file:
            return self.read(self._given(take))
        return self._codec.decode(self.latents(take, n)[0]).float().cpu().clamp(0, 1)

    def picture(self, take: SessionTake, n: int) -> Path:
        """The video or, of one frame, the image of one of a take's shots, made where it is missing."""
        folder = self.folder(take)
        for ending in ("mp4", "png"):
            if (path := folder / f"shot_{n}.{ending}").is_file():
                return path
        frames = self.frames(take, n)
        if frames.shape[1] == 1:
            return _whole(folder / f"shot_{n}.png", lambda path: write_image(path, frames))
        return _whole(folder / f"shot_{n}.mp4", lambda path: write_video(path, frames, fps=self._settings.fps))

    def sheet(self, take: SessionTake, history: Sequence[SessionTake]) -> Path:
        """A take's contact sheet, made where it is missing.

        Args:
            take: Whose.
            history: The takes of its history, one for each shot: these stand before it.
        """
        path = self.folder(take) / _SHEET
        if path.is_file():
            return path
        columns = [*zip(take.history, history, strict=True), *((n, take) for n in take.shots)]
        texts = [f"{n}. {of.script_shot(n).text} (take {of.number})" for n, of in columns]
        label = f"take {take.number}" if not history else f"what it sees, then take {take.number}"
        scene = SceneRows(texts, {label: [_read(self.picture(of, n)) for n, of in columns]})
        return _whole(path, lambda path: contact_sheet(path, [scene], title=take.told))

    def _given(self, take: SessionTake) -> Path:
        return self.folder(take) / f"given{Path(take.file or '').suffix}"


def check_size(size: tuple[int, int, int], codec: Codec, *, name: str, fix: str = "", as_video: bool = True) -> None:
    """Refuse what the codec can't take, or no video file can hold.

    Args:
        size: Frames, height and width in pixels.
        codec: The codec.
        name: What an error calls it.
        fix: What to do about odd pixels.
        as_video: Whether a video file is to hold it.

    Raises:
        ValueError: saying which it is.
    """
    try:
        codec.latent_shape(*size)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    frames, height, width = size
    if as_video and frames > 1 and (height % 2 or width % 2):
        said = f"{name}: got a video of {height} x {width} pixels, expected even ones, as MP4 files need"
        raise ValueError(said + fix)


def _read(path: Path) -> Tensor:
    return read_image(path) if path.suffix == ".png" else read_video(path, max_frames=10**9)


def _whole(path: Path, write: Callable[[Path], object]) -> Path:
    """Let a file take its path only when it is on the disk."""
    try:
        with replacing(path) as partial:
            write(partial)
    except OSError as error:
        why = f"{path}: can't be written ({error.strerror or error}); all takes are whole"
        raise OSError(error.errno, why) from error
    return path
