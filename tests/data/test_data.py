"""Videos, images and scene folders: what is written comes back, and what can't be read says why."""

import sys
import wave
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from lct_core.data import (
    SceneFolders,
    VideoScene,
    read_image,
    read_scene,
    read_video,
    scene_folders,
    write_image,
    write_scene,
    write_video,
)
from lct_core.script import Script, ScriptShot

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


@pytest.mark.parametrize(("files", "size"), [(100, (3, 24, 24)), (100, (5, 24, 24)), (20, (5, 256, 448))])
def test_the_same_frames_make_the_same_video(tmp_path: Path, files: int, size: tuple[int, int, int]) -> None:
    """On frames of these sizes x264's lookahead read memory that nobody wrote."""
    clip = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    videos = []
    for i in range(files):
        freed = [torch.rand(50_000) for _ in range(i % 7)]
        del freed  # what the encoder finds where it allocates
        write_video(tmp_path / "a.mp4", clip, fps=8)
        videos.append(read_video(tmp_path / "a.mp4"))
    assert all(torch.equal(video, videos[0]) for video in videos)


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


@pytest.mark.parametrize("name", ["%d.mp4", "pipe:1.mp4", "*[1]?{a}.mp4"])
def test_names_are_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(name, grey_levels(3), fps=12)
    assert read_video(name).shape == (3, 3, 32, 48)
    image = Path(name).with_suffix(".png")
    write_image(image, grey_levels(1))
    assert read_image(image).shape == (3, 1, 32, 48)


def test_images_come_back(tmp_path: Path) -> None:
    frame = torch.rand(3, 1, 17, 23, generator=torch.Generator().manual_seed(0))
    for path, written in {"a.png": frame, "b.PNG": frame[:, 0].double().requires_grad_()}.items():
        write_image(tmp_path / path, written)
        back = read_image(tmp_path / path)
        assert back.dtype == torch.float32
        assert torch.equal(back, (frame * 255).round() / 255)
        assert torch.equal(read_video(tmp_path / path), back)


@pytest.fixture
def picture(gradient: torch.Tensor) -> Image.Image:
    return Image.fromarray((gradient[:, 0] * 255).byte().permute(1, 2, 0).numpy())


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[:, None] / 255


@pytest.mark.parametrize(
    ("mode", "ending", "tolerance"),
    [
        ("RGB", "png", 0),
        ("RGB", "jpg", 4),
        ("RGB", "webp", 4),
        ("L", "png", 0),
        ("L", "jpeg", 1),
        ("P", "png", 0),
        ("1", "png", 0),
        ("RGBA", "png", 0),
        ("LA", "png", 0),
        ("RGBA", "webp", 4),
        ("CMYK", "jpg", 4),
    ],
)
def test_other_programs_images(tmp_path: Path, picture: Image.Image, mode: str, ending: str, tolerance: int) -> None:
    path = tmp_path / f"a.{ending}"
    picture.convert(mode).save(path, quality=95)
    back = read_image(path)
    assert back.shape == (3, 1, 64, 96)
    with Image.open(path) as image:
        torch.testing.assert_close(back, pixels(image), atol=tolerance / 255 + 1e-6, rtol=0)


@pytest.mark.parametrize(("orientation", "size"), [(1, (64, 96)), (3, (64, 96)), (6, (96, 64)), (8, (96, 64))])
@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_photographs_are_upright(
    tmp_path: Path, picture: Image.Image, orientation: int, size: tuple[int, int], ending: str
) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    path = tmp_path / f"a.{ending}"
    picture.save(path, quality=95, exif=exif)
    back = read_image(path)
    assert back.shape == (3, 1, *size)
    with Image.open(path) as image:
        assert (back - pixels(ImageOps.exif_transpose(image))).abs().mean() * 255 <= 2


def test_jpegs_are_whole(tmp_path: Path, picture: Image.Image) -> None:
    thumbnail = b"\xff\xd8\xff\xda\xff\xd9"
    path = tmp_path / "a.jpg"
    for progressive in (False, True):
        picture.save(path, progressive=progressive, exif=b"Exif\0\0" + thumbnail)
        whole = path.read_bytes()
        assert thumbnail in whole
        path.write_bytes(whole[:2] + b"\xff" + whole[2:] + b"a film may follow \xff\xda")
        assert read_image(path).shape == (3, 1, 64, 96)
        for end in (2, 3, 8, 100):
            path.write_bytes(whole[:-end])
            with pytest.raises(ValueError, match=r"a\.jpg: can't be decoded as an image \(.*is the file complete"):
                read_image(path)


def test_images_shrink_as_videos_do(tmp_path: Path, gradient: torch.Tensor) -> None:
    write_image(tmp_path / "a.png", gradient[:, :1])
    for options in ({"area": 1000, "multiple": 8}, {"area": 480 * 480}, {"multiple": 40}):
        assert torch.equal(read_image(tmp_path / "a.png", **options), read_video(tmp_path / "a.png", **options))
    assert read_image(tmp_path / "a.png", area=1000, multiple=8).shape == (3, 1, 24, 40)


@pytest.mark.parametrize(
    ("name", "frame", "message"),
    [
        ("a.jpg", torch.zeros(3, 16, 16), r"path: got .*a\.jpg, expected a name that ends in \.png"),
        ("a.png", torch.zeros(3, 2, 16, 16), r"frame: got shape \[3, 2, 16, 16\].*write_video writes several"),
        ("a.png", torch.zeros(16, 16), r"frame: got shape \[16, 16\].*expected floating point \[3, 1, height, width\]"),
        ("a.png", torch.zeros(3, 16, 16, dtype=torch.uint8), "torch.uint8"),
        ("a.png", torch.zeros(3, 0, 16), "floating point"),
        ("a.png", torch.full((3, 16, 16), 1.01), r"frame: got values from 1.01 to 1.01.*frame.clamp\(0, 1\)"),
    ],
)
def test_unwritable_images(tmp_path: Path, name: str, frame: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_image(tmp_path / name, frame)
    assert not (tmp_path / name).exists()


def test_unreadable_images(tmp_path: Path, picture: Image.Image) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.png: no such file, expected an image"):
        read_image(tmp_path / "none.png")
    for name in ("area", "multiple"):
        with pytest.raises(ValueError, match=f"{name}: got 0, expected at least 1"):
            read_image(tmp_path / "none.png", **{name: 0})
    for ending in ("png", "jpg", "webp"):
        path = tmp_path / f"a.{ending}"
        picture.save(path)
        whole = path.read_bytes()
        for content in (b"", b"not an image", whole[: len(whole) // 2], whole[:-16]):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=rf"a\.{ending}: (can't be decoded as an image|.*has no frame)"):
                read_image(path)
    write_video(tmp_path / "film.png", grey_levels(2), fps=12)
    with pytest.raises(ValueError, match=r"film\.png: more than one frame, expected an image; read_video"):
        read_image(tmp_path / "film.png")
    picture.save(tmp_path / "moving.png", save_all=True, append_images=[picture.rotate(180)])
    with pytest.raises(ValueError, match=r"moving\.png: more than one frame"):
        read_image(tmp_path / "moving.png")
    picture.save(tmp_path / "wide.png", dpi=(36, 72))
    with pytest.raises(ValueError, match=r"wide\.png: pixels are .* times as wide as high"):
        read_image(tmp_path / "wide.png")


@pytest.mark.parametrize("ending", ["png", "webp"])
def test_transparent_pixels(tmp_path: Path, picture: Image.Image, ending: str) -> None:
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    picture.save(tmp_path / f"a.{ending}", lossless=True)
    for read in (read_image, read_video):
        with pytest.raises(ValueError, match=rf"a\.{ending}: has transparent pixels, expected opaque ones; flatten it"):
            read(tmp_path / f"a.{ending}")


def test_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install lct-core\[video\]"):
        write_video(tmp_path / "a.mp4", grey_levels(1), fps=12)
    with pytest.raises(ImportError, match=r"pip install lct-core\[video\]"):
        read_video(tmp_path / "a.mp4")
    with pytest.raises(ImportError, match=r"pip install lct-core\[video\]"):
        write_image(tmp_path / "a.png", grey_levels(1))
    with pytest.raises(ImportError, match=r"pip install lct-core\[video\]"):
        read_image(tmp_path / "a.png")


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
