"""Videos and scene folders: what is written comes back, and what can't be read says why."""

import sys
import wave
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from lct_core.data import Clip, read_scene, read_video, scene_folders, write_scene, write_video

av = pytest.importorskip("av")


def flat(colours: torch.Tensor, *, height: int = 32, width: int = 48) -> torch.Tensor:
    """One frame per colour: [frames, 3] to [3, frames, height, width]."""
    return colours.T[..., None, None].expand(-1, -1, height, width)


def grey_levels(count: int) -> torch.Tensor:
    return flat(torch.linspace(0.1, 0.9, count)[:, None].expand(-1, 3))


def levels(frames: torch.Tensor, count: int) -> list[int]:
    """Which of ``grey_levels(count)`` each frame shows."""
    return (frames.mean((0, 2, 3))[:, None] - torch.linspace(0.1, 0.9, count)).abs().argmin(1).tolist()


@pytest.fixture
def gradient() -> torch.Tensor:
    across = torch.linspace(0, 1, 96).expand(64, -1)
    down = torch.linspace(0, 1, 64)[:, None].expand(-1, 96)
    return torch.stack([across, down, 1 - across])[:, None].expand(-1, 3, -1, -1)


def test_flat_colours_come_back(tmp_path: Path) -> None:
    colours = torch.rand(60, 3, generator=torch.Generator().manual_seed(0))
    colours[:8] = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    write_video(tmp_path / "flat.mp4", flat(colours), fps=12)
    frames = read_video(tmp_path / "flat.mp4")
    assert frames.shape == (3, 60, 32, 48)
    assert frames.dtype == torch.float32
    assert frames.min() >= 0
    assert frames.max() <= 1
    error = (frames - flat(colours)).abs() * 255
    assert error.max() <= 2
    assert error.mean() <= 0.7


def test_gradients_and_edges_come_back(tmp_path: Path, gradient: torch.Tensor) -> None:
    write_video(tmp_path / "gradient.mp4", gradient, fps=12)
    assert (read_video(tmp_path / "gradient.mp4") - gradient).abs().mean() * 255 <= 1.5
    halves = gradient.clone()
    halves[..., :48] = torch.tensor([0.9, 0.1, 0.1])[:, None, None, None]
    halves[..., 48:] = torch.tensor([0.1, 0.2, 0.9])[:, None, None, None]
    write_video(tmp_path / "halves.mp4", halves, fps=12)
    error = (read_video(tmp_path / "halves.mp4") - halves).abs().amax((0, 1, 2)) * 255
    assert error[:44].max() <= 3
    assert error[52:].max() <= 3


def test_one_frame_and_other_float_types(tmp_path: Path, gradient: torch.Tensor) -> None:
    write_video(tmp_path / "one.mp4", gradient[:, :1].double().requires_grad_(), fps=23.976)
    for fps in (None, 12, 23.976):
        assert read_video(tmp_path / "one.mp4", fps=fps).shape == (3, 1, 64, 96)


def test_files_play_commonly(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", grey_levels(3), fps=12)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 12
        assert (stream.codec_context.colorspace, stream.codec_context.color_range) == (1, 1)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (64, 96)),
        ({"area": 16 * 24}, (16, 24)),
        ({"area": 1000}, (26, 39)),
        ({"area": 1000, "multiple": 8}, (24, 40)),
        ({"area": 480 * 480}, (64, 96)),
        ({"area": 1}, (1, 1)),
        ({"area": 1, "multiple": 4}, (4, 4)),
        ({"multiple": 40}, (80, 80)),
    ],
)
def test_sizes(tmp_path: Path, gradient: torch.Tensor, options: dict[str, int], size: tuple[int, int]) -> None:
    write_video(tmp_path / "a.mp4", gradient, fps=12)
    small, full = read_video(tmp_path / "a.mp4", **options), read_video(tmp_path / "a.mp4")
    assert small.shape == (3, 3, *size)
    torch.testing.assert_close(small.mean((2, 3)), full.mean((2, 3)), atol=1e-5, rtol=0)


def test_whole_factors_average_blocks(tmp_path: Path, gradient: torch.Tensor) -> None:
    write_video(tmp_path / "a.mp4", gradient, fps=12)
    blocks = read_video(tmp_path / "a.mp4").unflatten(3, (24, 4)).unflatten(2, (16, 4)).mean((3, 5))
    torch.testing.assert_close(read_video(tmp_path / "a.mp4", area=16 * 24), blocks, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (None, [0, 1, 2, 3, 4, 5, 6]),
        (12, [0, 1, 2, 3, 4, 5, 6]),
        (6, [0, 2, 4, 6]),
        (4, [0, 3, 6]),
        (5, [0, 2, 4]),
        (24, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]),
        (1, [0]),
    ],
)
@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_sampling_rates(tmp_path: Path, fps: float | None, expected: list[int], ending: str) -> None:
    write_video(tmp_path / "a.mp4", grey_levels(7), fps=12)
    path = tmp_path / f"a.{ending}"
    if ending == "mkv":  # rounds times to milliseconds
        with av.open(str(tmp_path / "a.mp4")) as source, av.open(str(path), "w") as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(source.streams.video[0]):
                if packet.dts is not None:
                    packet.stream = stream
                    target.mux(packet)
    assert levels(read_video(path, fps=fps), 7) == expected


def test_rotation_is_applied(tmp_path: Path, gradient: torch.Tensor) -> None:
    write_video(tmp_path / "a.mp4", gradient, fps=12)
    data = (tmp_path / "a.mp4").read_bytes()
    matrix = data.index(b"tkhd") + 44  # 4 name, 4 version and flags, 20 times and id, 8 reserved, 8 layer to volume

    def fixed(*values: int) -> bytes:
        return b"".join(value.to_bytes(4, "big", signed=True) for value in values)

    quarter = fixed(0, 1 << 16, 0, -(1 << 16), 0, 0, 64 << 16, 0, 1 << 30)  # shown a quarter turned clockwise
    assert data[matrix : matrix + 36] == fixed(1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data[:matrix] + quarter + data[matrix + 36 :])
    turned = read_video(tmp_path / "turned.mp4")
    assert torch.equal(turned, torch.rot90(read_video(tmp_path / "a.mp4"), -1, dims=(2, 3)))


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (
            torch.zeros(3, 16, 16),
            r"frames: got shape \[3, 16, 16\].*expected floating point \[3, frames, height, width\]",
        ),
        (torch.zeros(4, 3, 16, 16), r"frames: got shape \[4, 3, 16, 16\]"),
        (torch.zeros(3, 0, 16, 16), "at least one frame"),
        (torch.zeros(3, 1, 16, 16, dtype=torch.uint8), "torch.uint8"),
        (torch.zeros(3, 1, 15, 16), "height 15 and width 16.*multiple=2"),
        (torch.full((3, 1, 16, 16), 1.01), r"values from 1.01 to 1.01.*clamp\(0, 1\)"),
        (-torch.ones(3, 1, 16, 16), "values from -1 to -1"),
        (torch.full((3, 1, 16, 16), torch.nan), "values from nan"),
    ],
)
def test_unwritable_frames(tmp_path: Path, frames: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "a.mp4", frames, fps=12)
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_rates_are_positive(tmp_path: Path, fps: float) -> None:
    with pytest.raises(ValueError, match=f"fps: got {fps}, expected a positive number"):
        write_video(tmp_path / "a.mp4", grey_levels(1), fps=fps)
    with pytest.raises(ValueError, match=f"fps: got {fps}, expected a positive number"):
        read_video(tmp_path / "a.mp4", fps=fps)


@pytest.mark.parametrize("name", ["area", "multiple", "max_frames"])
def test_arguments_are_counts(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: got 0, expected at least 1"):
        read_video(tmp_path / "a.mp4", **{name: 0})


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.mp4: no such file, expected a video"):
        read_video(tmp_path / "none.mp4")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_video(tmp_path)


def test_broken_files(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", grey_levels(3), fps=12)
    whole = (tmp_path / "a.mp4").read_bytes()
    for name, content in {"empty": b"", "noise": bytes(range(256)) * 8, "text": b"not a video"}.items():
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}\.mp4: can't be decoded as a video \(.*is the file complete"):
            read_video(path)
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.mp4: (no video stream|can't be decoded)"):
        read_video(tmp_path / "cut.mp4")


def test_no_video_stream(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", "not compressed"))
        sound.writeframes(bytes(1600))
    with pytest.raises(ValueError, match=r"sound\.wav: no video stream \(streams found: audio\)"):
        read_video(tmp_path / "sound.wav")


def test_no_frames(tmp_path: Path) -> None:
    path = tmp_path / "still.y4m"
    path.write_bytes(b"YUV4MPEG2 W16 H16 F12:1 Ip A1:1 C420jpeg\n")
    for fps in (None, 12):
        with pytest.raises(ValueError, match=r"still\.y4m: the video stream has no frame"):
            read_video(path, fps=fps)


def test_too_many_frames(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", grey_levels(7), fps=12)
    with pytest.raises(ValueError, match=r"a\.mp4: more than 6 frames, expected at most max_frames=6; cut the shot"):
        read_video(tmp_path / "a.mp4", max_frames=6)
    with pytest.raises(ValueError, match="more than 3 frames at 6 frames per second"):
        read_video(tmp_path / "a.mp4", max_frames=3, fps=6)
    assert read_video(tmp_path / "a.mp4", max_frames=4, fps=6).shape[1] == 4


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=12)
        stream.width = stream.height = 16
        stream.codec_context.sample_aspect_ratio = Fraction(16, 11)
        container.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match=r"a\.mkv: pixels are 16/11 times as wide as high.*setsar=1"):
        read_video(tmp_path / "a.mkv")


def test_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install lct-core\[video\]"):
        write_video(tmp_path / "a.mp4", grey_levels(1), fps=12)
    with pytest.raises(ImportError, match=r"pip install lct-core\[video\]"):
        read_video(tmp_path / "a.mp4")


def test_scene_round_trip(tmp_path: Path) -> None:
    shots = [Clip(f"Shot {k}: café.", grey_levels(k)) for k in range(1, 12)]
    write_scene(tmp_path / "data" / "scene", shots, fps=12)
    (tmp_path / "data" / "scene" / "notes.txt").write_text("not a shot")
    back = read_scene(tmp_path / "data" / "scene")
    assert [clip.text for clip in back] == [shot.text for shot in shots]
    for clip, shot in zip(back, shots, strict=True):
        torch.testing.assert_close(clip.frames, shot.frames, atol=2 / 255, rtol=0)
    small = read_scene(tmp_path / "data" / "scene", area=8 * 12, multiple=4, fps=6)
    assert small[10].frames.shape == (3, 6, 8, 12)
    with pytest.raises(ValueError, match=r"shot_6\.mp4: more than 5 frames"):
        read_scene(tmp_path / "data" / "scene", max_frames=5)


def test_scene_folders_in_natural_order(tmp_path: Path) -> None:
    names = ["scene_10", "scene_2", "scene_1", "b", "7", ".hidden"]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / "readme.txt").touch()
    assert [path.name for path in scene_folders(tmp_path)] == ["7", "b", "scene_1", "scene_2", "scene_10"]


def test_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none: no such folder, expected a folder of scene folders"):
        scene_folders(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="none: no such folder, expected a scene folder"):
        read_scene(tmp_path / "none")
    with pytest.raises(ValueError, match="no scene folder, expected one folder per scene"):
        scene_folders(tmp_path)
    with pytest.raises(ValueError, match=r"no shots, expected shot_1\.mp4 with shot_1\.txt"):
        read_scene(tmp_path)


def test_broken_scenes(tmp_path: Path) -> None:
    folder = tmp_path / "scene"
    write_scene(folder, [Clip("One.", grey_levels(1)), Clip("Two.", grey_levels(1))], fps=12)
    (folder / "shot_2.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"scene: the text of shot 2 \(shot_2\.txt\) is empty"):
        read_scene(folder)
    (folder / "shot_2.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"scene: shot 2 has no text, expected the file shot_2\.txt"):
        read_scene(folder)
    (folder / "shot_2.mp4").rename(folder / "shot_4.mp4")
    with pytest.raises(ValueError, match=r"scene: shots are numbered 1, 4, expected 1 to 4 without a gap.*add shot 2"):
        read_scene(folder)
    (folder / "shot_4.mp4").rename(folder / "shot_0.mp4")
    with pytest.raises(ValueError, match="scene: shots are numbered 0, 1, expected 1 to 1 without a gap; rename"):
        read_scene(folder)
    (folder / "shot_0.mp4").unlink()
    (folder / "shot_1.mp4").unlink()
    with pytest.raises(FileNotFoundError, match=r"scene: shot 1 has no video, expected the file shot_1\.mp4"):
        read_scene(folder)


def test_unwritable_scenes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shots: got none for .*scene, expected at least one"):
        write_scene(tmp_path / "scene", [], fps=12)
    with pytest.raises(ValueError, match=r"shots: shot 2 \(counting from 1\) of .*scene has an empty text"):
        write_scene(tmp_path / "scene", [Clip("One.", grey_levels(1)), Clip(" ", grey_levels(1))], fps=12)
    assert not (tmp_path / "scene").exists()
    write_scene(tmp_path / "scene", [Clip("One.", grey_levels(1))], fps=12)
    with pytest.raises(FileExistsError, match="scene: already holds shots"):
        write_scene(tmp_path / "scene", [Clip("One.", grey_levels(1))], fps=12)
