"""The demo's data: scenes of the world written to disk as MP4 files and scripts, and read back as a user's would be."""

import shutil
from pathlib import Path
from typing import Any

from lct_core.codec import LinearCodec
from lct_core.data import SceneFolders, VideoScene, scene_folders, write_scene
from lct_core.demo.world import PROMPT_LENGTH, VOCABULARY, WorldScene, render
from lct_core.progress import Stages

FRAMES, SIZE, FPS = 4, 24, 4  # frames of a shot, pixels that the model sees, frames per second
_FILE_SIZE = 96  # pixels in the files
PATCH, CHANNELS = 6, 24
READING: dict[str, Any] = {"area": SIZE * SIZE, "multiple": PATCH, "fps": float(FPS), "max_frames": FRAMES}


def write_scenes(root: Path, scenes: list[WorldScene], *, progress: Stages) -> None:
    """Render scenes into ``root/scene_1``, ``root/scene_2``, ..., in place of what is there."""
    shutil.rmtree(root, ignore_errors=True)
    with progress(f"write {len(scenes)} scenes, {root.name}", len(scenes)) as advance:
        for number, scene in enumerate(scenes, 1):
            shots = tuple(render(scene, size=_FILE_SIZE, frames=FRAMES))
            write_scene(root / f"scene_{number}", VideoScene(script=scene.script, shots=shots), fps=FPS)
            advance()


def read_scenes(root: Path, *, progress: Stages) -> SceneFolders:
    """Read them back at the size that the model sees."""
    count = len(scene_folders(root))
    with progress(f"read {count} scenes, {root.name}", count) as advance:
        return SceneFolders(root, on_scene=advance, **READING)


def make_codec(scenes: SceneFolders) -> LinearCodec:
    """Fit the autoencoder to the training scenes; the words are the world's."""
    clips = (clip for scene in scenes for clip in scene.shots)
    return LinearCodec.fit(clips, patch=PATCH, channels=CHANNELS, vocabulary=VOCABULARY, length=PROMPT_LENGTH)
