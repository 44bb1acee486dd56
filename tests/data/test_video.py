"""Videos: what is written comes back, and what can't be read says why."""

import wave
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from lct_core.data import (
    read_image,
    read_video,
    write_image,
    write_video,
)
from tests.data.frames import flat, grey_levels

av = pytest.importorskip("av")


def levels(frames: torch.Tensor, count: int) -> list[int]:
    """Which of ``grey_levels(count)`` each frame shows."""
    return (frames.mean((0, 2, 3))[:, None] - torch.linspace(0.1, 0.9, count)).abs().argmin(1).tolist()


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
