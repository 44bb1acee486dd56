"""Video files to frames and back: RGB in [0, 1], ``[channels, frames, height, width]``.

PyAV does the work. It is imported when a file is read or written, not before.
"""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from math import isfinite, sqrt
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# H.264 with 4:2:0 colour is what every browser, phone and player shows; 4:4:4 is not. Its colours are as good on flat
# regions (1/255 at this rate factor, BT.709 tagged), if swscale averages chroma and rounds properly, which it does only
# when told to. Chroma is a pixel softer at edges.
_CODEC = "libx264"
_PIXELS = "yuv420p"
_OPTIONS = {"crf": "1", "preset": "veryfast"}


def write_video(path: str | Path, frames: Float[Tensor, "3 frames height width"], *, fps: float) -> None:
    """Write frames as an H.264 MP4 file that plays everywhere, close to lossless.

    Colours of flat regions come back within 1/255 from ``read_video``; edges are softened in colour, not in brightness,
    by about a pixel (4:2:0).

    Args:
        path: File to write; one that is there is replaced. The folder must exist.
        frames: RGB in [0, 1], floating point, at least one frame, height and width even.
        fps: Frames per second.

    Raises:
        ImportError: PyAV is not installed.
        ValueError: frames of another shape, type or value range, or a rate that is not positive.
    """
    av = _import_av()
    if frames.ndim != 4 or frames.shape[0] != 3 or 0 in frames.shape or not frames.is_floating_point():
        raise ValueError(
            f"frames: got shape {list(frames.shape)} of {frames.dtype} for {path}, "
            "expected floating point [3, frames, height, width] with at least one frame"
        )
    height, width = frames.shape[2:]
    if height % 2 or width % 2:
        raise ValueError(
            f"frames: got height {height} and width {width} for {path}, expected even numbers (H.264 stores colour "
            "for 2 x 2 pixels); crop or pad by one pixel, or read with multiple=2"
        )
    low, high = frames.aminmax()
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"frames: got values from {low:.4g} to {high:.4g} for {path}, expected RGB in [0, 1]; "
            "rescale, or frames.clamp(0, 1) if they are a model's"
        )
    rate = _rate(fps)
    rgb = (frames.detach() * 255).round().to("cpu", torch.uint8).permute(1, 2, 3, 0).contiguous().numpy()
    flags = av.video.reformatter.Interpolation
    exact = flags.AREA | flags.ACCURATE_RND | flags.FULL_CHR_H_INP
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(_CODEC, rate=rate, options=_OPTIONS)
        stream.height, stream.width, stream.pix_fmt = height, width, _PIXELS
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = 1  # BT.709
        codec.color_range = 1  # limited ("MPEG") range
        for image in rgb:
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
                format=_PIXELS,
                src_colorspace="ITU709",
                dst_colorspace="ITU709",
                src_color_range="JPEG",
                dst_color_range="MPEG",
                interpolation=exact,
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def read_video(
    path: str | Path,
    *,
    area: int | None = None,
    multiple: int = 1,
    fps: float | None = None,
    max_frames: int = 125,
) -> Float[Tensor, "3 frames height width"]:
    """Read the first video stream of a file as float32 RGB in [0, 1].

    Frames are resized by exact area averaging, one by one as they are decoded, so memory holds the small frames only.
    Rotation that a file asks its player for (phones) is applied.

    Args:
        path: Any file that FFmpeg decodes.
        area: Pixels per frame to shrink to: height x width is about this, at the file's aspect ratio, without cropping.
            Smaller videos stay as they are. None keeps the file's size. (Paper, A.1: only downsampling, to 480 x 480.)
        multiple: Height and width are rounded to a multiple of this number of pixels (ours; what autoencoder and
            patches need).
        fps: Sampling rate: the frames on screen at 0, 1/fps, 2/fps, ... seconds. None takes every frame.
            (Paper, A.1: 12.)
        max_frames: Most frames that the shot may have after sampling (paper, A.1: 125).

    Raises:
        ImportError: PyAV is not installed.
        FileNotFoundError: there is no such file.
        ValueError: an argument out of range; a file that can't be decoded, or has no video, no frame, more than
            ``max_frames`` frames, or pixels that are not square.
    """
    av = _import_av()
    path = Path(path)
    for name, value in {"area": area, "multiple": multiple, "max_frames": max_frames}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    rate = None if fps is None else _rate(fps)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a video")
    frames: list[Tensor] = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
                raise ValueError(f"{path}: no video stream (streams found: {kinds}), expected a video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            if (stream.sample_aspect_ratio or 1) != 1:
                raise ValueError(
                    f"{path}: pixels are {stream.sample_aspect_ratio} times as wide as high, expected square ones; "
                    "convert the file with: ffmpeg -i IN -vf scale=iw*sar:ih,setsar=1 OUT"
                )
            decoded = container.decode(stream)
            for frame in (
                decoded if rate is None else _sample(decoded, fps=rate, shown_for=1 / (stream.average_rate or rate))
            ):
                if len(frames) == max_frames:
                    at = "" if fps is None else f" at {fps:g} frames per second"
                    raise ValueError(
                        f"{path}: more than {max_frames} frames{at}, expected at most max_frames={max_frames}; "
                        "cut the shot, sample at a lower fps, or raise max_frames"
                    )
                frames.append(_resize(_rgb(frame, av), area=area, multiple=multiple))
    except av.FFmpegError as error:
        raise ValueError(f"{path}: can't be decoded as a video ({error}); is the file complete?") from error
    if not frames:
        raise ValueError(f"{path}: the video stream has no frame, expected at least one")
    return torch.stack(frames, dim=1)


def _import_av() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise ImportError("reading and writing video needs PyAV: pip install lct-core[video]") from error
    return av


def _rate(fps: float) -> Fraction:
    if not (isfinite(fps) and fps > 0):
        raise ValueError(f"fps: got {fps}, expected a positive number of frames per second")
    return Fraction(fps).limit_denominator(1001)


def _sample(frames: Iterable[Any], *, fps: Fraction, shown_for: Fraction) -> Iterator[Any]:
    """Yield the frame on screen at 0, 1/fps, 2/fps, ... seconds; the last one stays there for ``shown_for`` seconds."""
    shown, time, due = None, Fraction(0), Fraction(0)
    for frame in frames:
        time = frame.pts * frame.time_base
        if shown is None:
            due = time + frame.time_base / 2  # files round times to ticks: a frame half a tick late is on time
        while due < time:
            yield shown
            due += 1 / fps
        shown = frame
    while shown is not None and due < time + shown_for:
        yield shown
        due += 1 / fps


def _rgb(frame: Any, av: ModuleType) -> Float[Tensor, "3 height width"]:
    flags = av.video.reformatter.Interpolation
    exact = flags.BILINEAR | flags.ACCURATE_RND | flags.FULL_CHR_H_INT
    rgb = torch.from_numpy(frame.reformat(format="rgb24", interpolation=exact).to_ndarray()).permute(2, 0, 1)
    return torch.rot90(rgb, frame.rotation // 90, dims=(1, 2)).float() / 255


def _resize(image: Float[Tensor, "3 height width"], *, area: int | None, multiple: int) -> Float[Tensor, "3 h w"]:
    height, width = image.shape[1:]
    scale = min(1.0, sqrt((area or height * width) / (height * width)))
    new = [max(1, round(n * scale / multiple)) * multiple for n in (height, width)]
    if new == [height, width]:
        return image
    return _averaging(height, new[0]) @ image @ _averaging(width, new[1]).T


def _averaging(old: int, new: int) -> Float[Tensor, "new old"]:
    """Row i averages the old pixels that the new pixel i covers, each by the part that it covers."""
    edges = torch.arange(new + 1, dtype=torch.float64) * old / new
    pixels = torch.arange(old, dtype=torch.float64)
    covered = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
    return (covered.clamp(min=0) * new / old).float()
