"""Scenes on disk: a folder per scene with its script and a video or an image per shot; videos and images as frames."""

from lct_core.data.scenes import SceneFolders, Skipped, VideoScene, read_scene, scene_folders, write_scene
from lct_core.data.video import read_image, read_video, write_image, write_video

__all__ = [
    "SceneFolders",
    "Skipped",
    "VideoScene",
    "read_image",
    "read_scene",
    "read_video",
    "scene_folders",
    "write_image",
    "write_scene",
    "write_video",
]
