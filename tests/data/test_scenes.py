"""Scene folders: one file per shot of the script, and data sets of them."""

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from lct_core.data import (
    SceneFolders,
    VideoScene,
    read_scene,
    scene_folders,
    write_scene,
)
from lct_core.script import Script, ScriptShot
from tests.data.frames import flat, grey_levels

av = pytest.importorskip("av")


def script(count: int) -> Script:
    shots = tuple(ScriptShot(text=f"Shot {k}: Zoë orders a café.", cut=k % 2 == 1) for k in range(1, count + 1))
    return Script(shots=shots, characters={1: "Zoë, in a red coat."}, environment="A bar at night.")


def scene(*lengths: int) -> VideoScene:
    """A scene whose shots have so many frames."""
    return VideoScene(script=script(len(lengths)), shots=tuple(grey_levels(length) for length in lengths))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A scene of two shots: a video of 7 frames and an image."""
    write_scene(tmp_path / "data" / "scene_1", scene(7, 1), fps=12)
    return tmp_path / "data" / "scene_1"


def test_scene_round_trip(tmp_path: Path) -> None:
    written = scene(*range(1, 12))
    write_scene(tmp_path / "data" / "scene", written, fps=12)
    (tmp_path / "data" / "scene" / "notes.txt").write_text("not a shot")
    (tmp_path / "data" / "scene" / "shot_3.txt").write_text("nor this")
    back = read_scene(tmp_path / "data" / "scene")
    assert back.script == written.script
    assert back.name == "scene"
    for read, shot in zip(back.shots, written.shots, strict=True):
        torch.testing.assert_close(read, shot, atol=2 / 255, rtol=0)
    small = read_scene(tmp_path / "data" / "scene", area=8 * 12, multiple=4, fps=6)
    assert [shot.shape for shot in small.shots] == [(3, (k + 1) // 2, 8, 12) for k in range(1, 12)]


def test_one_frame_is_an_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["script.txt", "shot_1.mp4", "shot_2.png"]
    assert torch.equal(read_scene(folder).shots[1], (grey_levels(1) * 255).round() / 255)
    monkeypatch.chdir(folder)
    assert read_scene(".").name == "scene_1"


@pytest.mark.parametrize("ending", ["mov", "mkv", "webm", "avi", "MP4", "jpg", "jpeg", "webp", "JPG"])
def test_endings(folder: Path, picture: Image.Image, ending: str) -> None:
    if ending.lower() in ("jpg", "jpeg", "webp"):
        (folder / "shot_2.png").unlink()
        picture.save(folder / f"shot_2.{ending}")
        assert read_scene(folder).shots[1].shape == (3, 1, 64, 96)
    else:  # what is in a video file is for FFmpeg to find out
        (folder / "shot_1.mp4").rename(folder / f"shot_1.{ending}")
        assert read_scene(folder).shots[0].shape == (3, 7, 32, 48)


def test_shots_keep_their_own_aspect_ratio(tmp_path: Path) -> None:
    sizes = {"wide": (180, 320), "tall": (320, 180), "square": (48, 48)}
    shots = tuple(flat(torch.full((2, 3), 0.5), height=height, width=width) for height, width in sizes.values())
    write_scene(tmp_path / "scene", VideoScene(script=script(3), shots=shots), fps=12)
    wide, tall, square = (shot.shape[2:] for shot in read_scene(tmp_path / "scene", area=120 * 120, multiple=2).shots)
    assert wide == (90, 160)
    assert tall == (160, 90)
    assert square == (48, 48)


def test_scene_folders_in_natural_order(tmp_path: Path) -> None:
    names = ["scene_10", "scene_2", "scene_1", "b", "7", ".hidden"]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / "readme.txt").touch()
    assert [path.name for path in scene_folders(tmp_path)] == ["7", "b", "scene_1", "scene_2", "scene_10"]


def test_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none: no such folder, expected a folder of scene folders"):
        scene_folders(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="none: no such folder, expected a folder of scene folders"):
        SceneFolders(tmp_path / "none", skip_bad=True)
    with pytest.raises(FileNotFoundError, match="none: no such folder, expected a scene folder"):
        read_scene(tmp_path / "none")
    with pytest.raises(ValueError, match="no scene folder, expected one folder per scene"):
        scene_folders(tmp_path)


def test_scripts_are_required(folder: Path) -> None:
    (folder / "script.txt").write_text("no script")
    with pytest.raises(ValueError, match=r"scene_1/script\.txt: "):
        read_scene(folder)
    (folder / "script.txt").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"scene_1/script\.txt: no such file, expected the scene's script beside its shots; write",
    ):
        read_scene(folder)


def test_one_file_per_shot_of_the_script(folder: Path) -> None:
    (folder / "shot_2.png").rename(folder / "away.png")
    with pytest.raises(
        FileNotFoundError, match=r"^shot 2 of scene_1: .*scene_1/shot_2\.mp4: no such file, .*\(\.mp4, .*, \.webp\)"
    ):
        read_scene(folder)
    (folder / "away.png").rename(folder / "shot_2.jpg")
    (folder / "shot_02.mp4").touch()
    with pytest.raises(
        ValueError, match=r"^shot 2 of scene_1: .*scene_1/shot_02\.mp4 and .*scene_1/shot_2\.jpg: expected one file"
    ):
        read_scene(folder)
    for number in (0, 3):
        (folder / "shot_02.mp4").unlink(missing_ok=True)
        (folder / f"shot_{number}.webm").touch()
        with pytest.raises(
            ValueError,
            match=rf"^shot {number} of scene_1: .*shot_{number}\.webm: not in the script, whose shots are 1 to 2; add",
        ):
            read_scene(folder)
        (folder / f"shot_{number}.webm").unlink()


def test_errors_of_a_shot_say_which(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^shot 1 of scene_1: .*scene_1/shot_1\.mp4: more than 3 frames at 6 frames per"
    ):
        read_scene(folder, max_frames=3, fps=6)
    (folder / "shot_2.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"^shot 2 of scene_1: .*scene_1/shot_2\.png: can't be decoded as an image"):
        read_scene(folder)
    (folder / "shot_1.mp4").unlink()
    (folder / "shot_1.mp4").mkdir()
    with pytest.raises(FileNotFoundError, match=r"^shot 1 of scene_1: .*scene_1/shot_1\.mp4: no such file"):
        read_scene(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"area": 0}, "^area: got 0"),
        ({"multiple": 0}, "^multiple: got 0"),
        ({"fps": 0}, "^fps: got 0"),
        ({"max_frames": 0}, "^max_frames: got 0"),
    ],
)
def test_arguments_are_not_the_scene_s_fault(folder: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_scene(folder, **options)
    with pytest.raises(ValueError, match=message):
        SceneFolders(folder.parent, **options, skip_bad=True)


def test_scenes_fit_their_scripts() -> None:
    with pytest.raises(
        ValueError, match=r"shots: got 1 for scene 'bar', expected one per shot of the script, which has 2"
    ):
        VideoScene(script=script(2), shots=(grey_levels(1),), name="bar")
    for bad in (torch.zeros(3, 16, 16), torch.zeros(4, 1, 16, 16), torch.zeros(3, 0, 16, 16), grey_levels(1).byte()):
        with pytest.raises(ValueError, match=r"shots: shot 2 \(counting from 1\) of scene 'bar' has shape .*expected"):
            VideoScene(script=script(2), shots=(grey_levels(1), bad), name="bar")


def test_unwritable_scenes(tmp_path: Path, folder: Path) -> None:
    odd = VideoScene(script=script(2), shots=(grey_levels(2), torch.zeros(3, 2, 15, 16)))
    with pytest.raises(ValueError, match=r"^shot 2 of odd: frames: got height 15 .*odd/shot_2\.mp4.*multiple=2"):
        write_scene(tmp_path / "odd", odd, fps=12)
    assert not (tmp_path / "odd" / "script.txt").exists()
    for name in ("script.txt", "shot_1.mp4", "shot_2.png"):
        for path in folder.iterdir():
            if path.name != name:
                path.rename(tmp_path / path.name)
        with pytest.raises(FileExistsError, match="scene_1: already holds a scene"):
            write_scene(folder, scene(1), fps=12)
        for other in {"script.txt", "shot_1.mp4", "shot_2.png"} - {name}:
            (tmp_path / other).rename(folder / other)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Scenes of 1, 2, 3 and 4 frames in one shot, named by them."""
    for count in range(1, 5):
        write_scene(tmp_path / "scenes" / f"scene_{count}", scene(count), fps=12)
    return tmp_path / "scenes"


FRAME = 3 * 32 * 48 * 4  # bytes


def test_a_data_set_is_a_sequence(root: Path) -> None:
    seen: list[None] = []
    data = SceneFolders(root, on_scene=lambda: seen.append(None))
    assert len(data) == len(seen) == 4
    assert data.skipped == ()
    assert [one.name for one in data] == ["scene_1", "scene_2", "scene_3", "scene_4"]
    assert data[-1].name == "scene_4"
    assert [one.name for one in data[1:-1]] == ["scene_2", "scene_3"]
    assert data[::-2][1].shots[0].shape[1] == 2
    for index in (4, -5):
        with pytest.raises(IndexError):
            data[index]
    small = SceneFolders(root, area=8 * 12, multiple=4, fps=6, max_frames=2, memory=0)
    assert [one.shots[0].shape for one in small] == [(3, count, 8, 12) for count in (1, 1, 2, 2)]


def test_bad_scenes_are_errors(root: Path) -> None:
    seen: list[None] = []
    with pytest.raises(ValueError, match=r"^shot 1 of scene_3: .*scene_3/shot_1\.mp4: more than 2 frames"):
        SceneFolders(root, max_frames=2, on_scene=lambda: seen.append(None))
    assert len(seen) == 2
    (root / "scene_2" / "script.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"scene_2/script\.txt: no such file"):
        SceneFolders(root)


def test_bad_scenes_are_skipped_but_told(root: Path) -> None:
    (root / "scene_2" / "script.txt").unlink()
    seen: list[None] = []
    data = SceneFolders(root, max_frames=3, skip_bad=True, on_scene=lambda: seen.append(None))
    assert [one.name for one in data] == ["scene_1", "scene_3"]
    assert len(seen) == 4
    assert [skipped.folder for skipped in data.skipped] == [root / "scene_2", root / "scene_4"]
    assert "script.txt: no such file" in data.skipped[0].reason
    assert data.skipped[1].reason.startswith("shot 1 of scene_4: ")
    for one in root.iterdir():
        (one / "script.txt").unlink(missing_ok=True)
    with pytest.raises(
        ValueError, match=r"scenes: all scenes are bad \(4\), the first: .*scene_1/script\.txt: no such"
    ):
        SceneFolders(root, skip_bad=True)


def test_other_errors_are_not_skipped(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise ValueError("not a scene's")

    with pytest.raises(ValueError, match="not a scene's"):
        SceneFolders(root, skip_bad=True, on_scene=fails)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install lct-core\[video\]"):
        SceneFolders(root, skip_bad=True)


@pytest.mark.parametrize(
    ("memory", "kept"),
    [(0, set()), (FRAME - 1, set()), (3 * FRAME, {1, 2}), (7 * FRAME, {1, 2, 3}), (10 * FRAME, {1, 2, 3, 4})],
)
def test_memory_is_bounded(root: Path, memory: int, kept: set[int]) -> None:
    data = SceneFolders(root, memory=memory)
    for one in data:
        assert one.shots[0].shape[1] == int(one.name[-1])  # nothing that is read later is kept
    for one in root.iterdir():
        (one / "script.txt").unlink()
    for count in range(1, 5):
        if count in kept:
            torch.testing.assert_close(data[count - 1].shots[0], grey_levels(count), atol=2 / 255, rtol=0)
        else:
            with pytest.raises(FileNotFoundError, match=rf"scene_{count}/script\.txt: no such file"):
                data[count - 1]
