"""The kept shots of a session as a scene folder."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

from lct_core.data import VideoScene, write_scene
from lct_core.pictures.scene import write_views
from lct_core.session.archive import Archive
from lct_core.session.book import Book


def export_scene(book: Book, archive: Archive, own: Path, out: Path | None) -> list[Path]:
    """Write the kept shots as a scene folder.

    Args:
        book: Says which shots are kept.
        archive: Has their frames.
        own: The session's own folder for it, whose older scene is replaced when the new one is whole.
        out: Another folder, without a scene (default: ``own``).

    Returns:
        The folder, its contact sheet and, where all shots are of one size, the video of it all.

    Raises:
        FileExistsError: ``out`` holds a scene.
        ValueError: where nothing is kept, or a shot is missing before the last that is.
    """
    last = max(book.state.kept, default=0)
    if not last or book.next <= last:
        raise ValueError(f"scene: shot {book.next} is not kept, expected all up to the last; generate it, and keep it")
    texts = tuple(book.kept(n).script_shot(n) for n in range(1, last + 1))
    frames = [archive.frames(book.kept(n), n) for n in range(1, last + 1)]
    folder = own.with_name(f"{own.name}.partial") if out is None else out
    if out is None:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        scene = VideoScene(script=replace(book.script, shots=texts), shots=tuple(frames))
        fps, label = book.settings.fps, f"branch {book.branch}"
        write_scene(folder, scene, fps=fps)
        views = write_views(folder, [text.text for text in texts], frames, label=label, fps=fps)
    except BaseException:
        if out is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if out is None:
        shutil.rmtree(own, ignore_errors=True)
        os.replace(folder, own)
    home = own if out is None else folder
    return [home, *(home / view.name for view in views)]
