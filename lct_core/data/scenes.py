"""Scene folders: a data set is a folder of scenes, a scene is a folder of numbered shots, a shot is a video and a text.

::

    dataset/
      scene_1/
        shot_1.mp4  shot_1.txt
        shot_2.mp4  shot_2.txt
      scene_2/
        ...
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from lct_core.data.video import read_video, write_video

_SHOT_FILE = re.compile(r"shot_(\d+)\.(mp4|txt)")


@dataclass(frozen=True, eq=False)
class Clip:
    """One shot of a scene: what happens, and how it looks.

    Args:
        text: The shot's prompt.
        frames: RGB in [0, 1], ``[3, frames, height, width]``.
    """

    text: str
    frames: Float[Tensor, "3 frames height width"]


def write_scene(folder: str | Path, shots: Sequence[Clip], *, fps: float) -> None:
    """Write a scene's shots into a folder as ``shot_1.mp4``, ``shot_1.txt``, ``shot_2.mp4``, ...

    Args:
        folder: Folder to write to, made where it is missing; other files in it are left alone.
        shots: The scene's shots in order.
        fps: Frames per second of the videos.

    Raises:
        ImportError: PyAV is not installed.
        ValueError: no shot, a shot without text, or frames that ``write_video`` refuses.
        FileExistsError: the folder already holds shots.
    """
    folder = Path(folder)
    if not shots:
        raise ValueError(f"shots: got none for {folder}, expected at least one")
    for number, shot in enumerate(shots, start=1):
        if not shot.text.strip():
            raise ValueError(
                f"shots: shot {number} (counting from 1) of {folder} has an empty text, expected its prompt"
            )
    folder.mkdir(parents=True, exist_ok=True)
    if _shot_numbers(folder):
        raise FileExistsError(f"{folder}: already holds shots, expected a folder without; remove them or name another")
    for number, shot in enumerate(shots, start=1):
        write_video(folder / f"shot_{number}.mp4", shot.frames, fps=fps)
        (folder / f"shot_{number}.txt").write_text(shot.text.strip() + "\n", encoding="utf-8")


def read_scene(
    folder: str | Path,
    *,
    area: int | None = None,
    multiple: int = 1,
    fps: float | None = None,
    max_frames: int = 125,
) -> tuple[Clip, ...]:
    """Read a scene folder's shots in order. Files that are not named like a shot's are ignored.

    Args:
        folder: A scene folder.
        area: Pixels per frame to shrink to, see ``read_video``.
        multiple: What height and width are a multiple of, see ``read_video``.
        fps: Sampling rate, see ``read_video``.
        max_frames: Most frames per shot, see ``read_video``.

    Raises:
        ImportError: PyAV is not installed.
        FileNotFoundError: there is no such folder; a shot's video or text is missing.
        ValueError: the folder holds no shot; the numbers don't run 1, 2, 3, ...; a text is empty; ``read_video``
            refuses a video.
    """
    folder = Path(folder)
    numbers = _shot_numbers(_existing(folder, "a scene folder"))
    if not numbers:
        raise ValueError(f"{folder}: no shots, expected shot_1.mp4 with shot_1.txt, shot_2.mp4 with shot_2.txt, ...")
    missing = sorted(set(range(1, max(numbers) + 1)) - numbers)
    if missing or 0 in numbers:
        raise ValueError(
            f"{folder}: shots are numbered {', '.join(map(str, sorted(numbers)))}, expected 1 to {max(numbers)} "
            f"without a gap; rename the files{f' or add shot {missing[0]}' if missing else ''}"
        )
    for number in sorted(numbers):
        for kind, what in {"mp4": "video", "txt": "text"}.items():
            if not (folder / f"shot_{number}.{kind}").is_file():
                raise FileNotFoundError(
                    f"{folder}: shot {number} has no {what}, expected the file shot_{number}.{kind}"
                )
    return tuple(
        Clip(
            _read_text(folder, number),
            read_video(folder / f"shot_{number}.mp4", area=area, multiple=multiple, fps=fps, max_frames=max_frames),
        )
        for number in sorted(numbers)
    )


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


def _existing(folder: Path, what: str) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder, expected {what}")
    return folder


def _shot_numbers(folder: Path) -> set[int]:
    return {int(match[1]) for path in folder.iterdir() if (match := _SHOT_FILE.fullmatch(path.name))}


def _read_text(folder: Path, number: int) -> str:
    try:
        text = (folder / f"shot_{number}.txt").read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{folder}: the text of shot {number} (shot_{number}.txt) is not UTF-8: {error}") from error
    if not text:
        raise ValueError(
            f"{folder}: the text of shot {number} (shot_{number}.txt) is empty, expected the shot's prompt"
        )
    return text
