"""Scene folders: a data set is a folder of scenes, a scene is a folder with a script and a video or image per shot.

::

    dataset/
      scene_1/
        script.txt
        shot_1.mp4
        shot_2.png
      scene_2/
        ...
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

from jaxtyping import Float
from torch import Tensor

from lct_core.data.video import are_frames, check_reading, read_image, read_video, write_image, write_video
from lct_core.script import Script, read_script

_SCRIPT = "script.txt"
_VIDEOS = ("mp4", "mov", "mkv", "webm", "avi")
_IMAGES = ("png", "jpg", "jpeg", "webp")
_SHOT_FILE = re.compile(rf"shot_([0-9]+)\.({'|'.join(_VIDEOS + _IMAGES)})", re.IGNORECASE)


@dataclass(frozen=True, eq=False, kw_only=True)
class VideoScene:
    """A scene as it is seen: the script, and the frames of each of its shots.

    Args:
        script: What happens, shot by shot.
        shots: One tensor per shot of the script: RGB in [0, 1], floating point, ``[3, frames, height, width]``, each of
            its own size. One frame is an image.
        name: What to call the scene: its folder's name.

    Raises:
        ValueError: not as many shots as the script has, or a shot of another shape or type.
    """

    script: Script
    shots: tuple[Float[Tensor, "3 frames height width"], ...]
    name: str = ""

    def __post_init__(self) -> None:
        if len(self.shots) != len(self.script.shots):
            raise ValueError(
                f"shots: got {len(self.shots)} for scene {self.name!r}, expected one per shot of the script, which has "
                f"{len(self.script.shots)}"
            )
        for number, shot in enumerate(self.shots, start=1):
            if not are_frames(shot):
                raise ValueError(
                    f"shots: shot {number} (counting from 1) of scene {self.name!r} has shape {list(shot.shape)} of "
                    f"{shot.dtype}, expected floating point [3, frames, height, width] with at least one frame"
                )


def write_scene(folder: str | Path, scene: VideoScene, *, fps: float) -> None:
    """Write a scene into a folder: ``script.txt``, and ``shot_1.mp4``, ``shot_2.mp4``, ...

    A shot of one frame becomes an image, ``shot_1.png``, which is lossless (see ``write_image``, ``write_video``).

    Args:
        folder: Folder to write to, made where it is missing; other files in it are left alone. The scene's own name is
            not used.
        scene: The scene.
        fps: Frames per second of the videos.

    Raises:
        ImportError: PyAV is not installed.
        FileExistsError: the folder already holds a script or shots.
        ValueError: ``write_video`` or ``write_image`` refuses a shot.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / _SCRIPT).exists() or any(_SHOT_FILE.fullmatch(path.name) for path in folder.iterdir()):
        raise FileExistsError(f"{folder}: already holds a scene, expected a folder without; remove it or name another")
    for number, shot in enumerate(scene.shots, start=1):
        with _about(number, folder):
            if shot.shape[1] == 1:
                write_image(folder / f"shot_{number}.png", shot)
            else:
                write_video(folder / f"shot_{number}.mp4", shot, fps=fps)
    (folder / _SCRIPT).write_text(scene.script.render(), encoding="utf-8")  # last: a scene with a script is whole


def read_scene(
    folder: str | Path,
    *,
    area: int | None = None,
    multiple: int = 1,
    fps: float | None = None,
    max_frames: int = 125,
) -> VideoScene:
    """Read a scene folder: its script, and the file of each shot in order, at that file's own aspect ratio.

    Shot k is a video, ``shot_k.mp4`` (or .mov, .mkv, .webm, .avi), or an image, ``shot_k.png`` (or .jpg, .jpeg, .webp).
    Files of other names are ignored.

    Args:
        folder: A scene folder.
        area: Pixels per frame to shrink to, see ``read_video``. (Paper, A.1: 480 x 480.)
        multiple: What height and width are a multiple of, see ``read_video``.
        fps: Sampling rate of the videos, see ``read_video``. (Paper, A.1: 12.)
        max_frames: Most frames per shot, see ``read_video``. (Paper, A.1: 125.)

    Raises:
        ImportError: PyAV is not installed.
        FileNotFoundError: there is no such folder, no script in it, or no file for a shot of the script.
        ValueError: an argument out of range; ``read_script`` refuses the script; two files for one shot, or one for a
            shot that the script doesn't have; ``read_video`` or ``read_image`` refuses a file.
    """
    check_reading(area=area, multiple=multiple, fps=fps, max_frames=max_frames)
    folder = Path(folder)
    script_file = _existing(folder, "a scene folder") / _SCRIPT
    if not script_file.is_file():
        raise FileNotFoundError(
            f"{script_file}: no such file, expected the scene's script beside its shots; "
            "write one, in a format that lct_core.script describes"
        )
    script = read_script(script_file)
    shots: list[Tensor] = []
    for number, path in enumerate(_shot_files(folder, len(script.shots)), start=1):
        with _about(number, folder):
            shots.append(read_clip(path, area=area, multiple=multiple, fps=fps, max_frames=max_frames))
    return VideoScene(script=script, shots=tuple(shots), name=_name(folder))


def read_clip(path: str | Path, **reading: Any) -> Float[Tensor, "3 frames height width"]:
    """The frames of a video, or of an image by its name, RGB in [0, 1].

    Args:
        path: The file.
        reading: Arguments of :func:`read_video`; an image takes ``area`` and ``multiple`` alone.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_video` and :func:`read_image` do.
    """
    if Path(path).suffix[1:].lower() in _VIDEOS:
        return read_video(path, **reading)
    return read_image(path, **{name: reading[name] for name in ("area", "multiple") if name in reading})


def scene_folders(root: str | Path) -> list[Path]:
    """List the scene folders of a data set in natural order: ``scene_2`` before ``scene_10``. Hidden ones are skipped.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no folder.
    """
    root = Path(root)
    folders = [path for path in _existing(root, "a folder of scene folders").iterdir() if path.is_dir()]
    folders = [path for path in folders if not path.name.startswith(".")]
    if not folders:
        raise ValueError(f"{root}: no scene folder, expected one folder per scene; read_scene reads a single one")
    return sorted(folders, key=lambda path: [int(p) if p.isdigit() else p for p in re.split(r"([0-9]+)", path.name)])


class Skipped(NamedTuple):
    """A scene that was left out, and why."""

    folder: Path
    reason: str


class SceneFolders(Sequence[VideoScene]):
    """A data set: the scenes of a folder, each read when it is asked for.

    All are read once when this is made, so that a bad scene shows at the start. Bad is a scene that ``read_scene``
    refuses with a ValueError or FileNotFoundError. A slice is a list of scenes.

    From the first reading, scenes stay in memory while they fit, and are returned again: don't write into them. The
    others are read from disk each time they are asked for, with the errors of ``read_scene``. Frames are kept as they
    are, in float32 (resized ones don't fit in fewer bits): a shot at the paper's limits (A.1: 125 frames of 480 x 480)
    takes 346 MB.

    Args:
        root: A folder of scene folders, see ``scene_folders``.
        area: Pixels per frame to shrink to, see ``read_video``. (Paper, A.1: 480 x 480.)
        multiple: What height and width are a multiple of, see ``read_video``.
        fps: Sampling rate of the videos, see ``read_video``. (Paper, A.1: 12.)
        max_frames: Most frames per shot, see ``read_video``. (Paper, A.1: 125.)
        skip_bad: Leave bad scenes out and list them in ``skipped``, rather than raise the first one's error.
        memory: Most bytes of frames to keep in memory (ours: 2 GiB). 0 keeps none.
        on_scene: Called after each scene of the first reading, bad ones included: for a progress bar.

    Attributes:
        skipped: The scenes left out, with the reasons, in the folder's order.

    Raises:
        ImportError: PyAV is not installed.
        FileNotFoundError: there is no such folder; or a bad scene's.
        ValueError: an argument out of range; no scene folder; or a bad scene's; all scenes are bad.
    """

    skipped: tuple[Skipped, ...]

    def __init__(
        self,
        root: str | Path,
        *,
        area: int | None = None,
        multiple: int = 1,
        fps: float | None = None,
        max_frames: int = 125,
        skip_bad: bool = False,
        memory: int = 2 * 2**30,
        on_scene: Callable[[], None] | None = None,
    ) -> None:
        check_reading(area=area, multiple=multiple, fps=fps, max_frames=max_frames)
        self._area, self._multiple, self._fps, self._max_frames = area, multiple, fps, max_frames
        self._kept: dict[Path, VideoScene] = {}
        good: list[Path] = []
        skipped: list[Skipped] = []
        for folder in scene_folders(root):
            try:
                scene = self._read(folder)
            except (ValueError, FileNotFoundError) as error:
                if not skip_bad:
                    raise
                skipped.append(Skipped(folder, str(error)))
            else:
                good.append(folder)
                size = sum(shot.nbytes for shot in scene.shots)
                if size <= memory:
                    self._kept[folder] = scene
                    memory -= size
            if on_scene is not None:
                on_scene()
        if not good:
            raise ValueError(f"{root}: all scenes are bad ({len(skipped)}), the first: {skipped[0].reason}")
        self._folders = tuple(good)
        self.skipped = tuple(skipped)

    def __len__(self) -> int:
        return len(self._folders)

    @overload
    def __getitem__(self, index: int) -> VideoScene: ...
    @overload
    def __getitem__(self, index: slice) -> list[VideoScene]: ...
    def __getitem__(self, index: int | slice) -> VideoScene | list[VideoScene]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        folder = self._folders[index]
        return self._kept[folder] if folder in self._kept else self._read(folder)

    def _read(self, folder: Path) -> VideoScene:
        return read_scene(folder, area=self._area, multiple=self._multiple, fps=self._fps, max_frames=self._max_frames)


def _existing(folder: Path, what: str) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder, expected {what}")
    return folder


def _name(folder: Path) -> str:
    return folder.absolute().name  # Path(".") has none


def _shot_files(folder: Path, count: int) -> list[Path]:
    """Find the file of each of the script's ``count`` shots, in order."""
    found: dict[int, list[Path]] = {number: [] for number in range(1, count + 1)}
    for path in sorted(folder.iterdir()):
        if match := _SHOT_FILE.fullmatch(path.name):
            found.setdefault(int(match[1]), []).append(path)
    for number, paths in found.items():
        with _about(number, folder):
            if not 1 <= number <= count:
                raise ValueError(
                    f"{paths[0]}: not in the script, whose shots are 1 to {count}; "
                    f"add the shot to {_SCRIPT}, or rename or remove the file"
                )
            if not paths:
                raise FileNotFoundError(
                    f"{folder / f'shot_{number}.mp4'}: no such file, expected the shot's video or image "
                    f"(.{', .'.join(_VIDEOS + _IMAGES)})"
                )
            if len(paths) > 1:
                raise ValueError(f"{' and '.join(map(str, paths))}: expected one file per shot; remove the others")
    return [paths[0] for paths in found.values()]


@contextmanager
def _about(number: int, folder: Path) -> Iterator[None]:
    """Begin an error's words with the shot that it is about."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        kind = ValueError if isinstance(error, ValueError) else FileNotFoundError
        raise kind(f"shot {number} of {_name(folder)}: {error}") from error
