"""Scenes on disk: video files, and folders that hold a scene's shots with their texts."""

from lct_core.data.scenes import Clip, read_scene, scene_folders, write_scene
from lct_core.data.video import read_video, write_video

__all__ = ["Clip", "read_scene", "read_video", "scene_folders", "write_scene", "write_video"]
