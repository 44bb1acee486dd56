"""Video files to frames and back: RGB in [0, 1], ``[channels, frames, height, width]``.

PyAV does the work. It is imported when a file is read or written, not before.
"""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from math import isfinite, sqrt
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

# H.264 with 4:2:0 colour is what every browser, phone and player shows; 4:4:4 is not. Its colours are as good on flat
# regions (a level of 255 at this rate factor, tagged BT.709) if swscale averages chroma and rounds properly, which it
# does only when told to.
_CODEC = "libx264"
_PIXELS = "yuv420p"
_OPTIONS = {"crf": "1", "preset": "veryfast"}
_TO_YUV = 0x20 | 0x4000 | 0x40000  # SWS_AREA | SWS_FULL_CHR_H_INP | SWS_ACCURATE_RND; older PyAV has no names for them
_TO_RGB = 0x02 | 0x2000 | 0x40000  # SWS_BILINEAR | SWS_FULL_CHR_H_INT | SWS_ACCURATE_RND


def write_video(path: str | Path, frames: Float[Tensor, "3 frames height width"], *, fps: float) -> None:
    """Write frames as an H.264 MP4 file that plays everywhere, close to lossless.

    Colours of flat regions come back from ``read_video`` within 2/255, 8-bit rounding included; edges are softened in
    colour, not in brightness, by about a pixel (4:2:0).

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
    rgb = frames.detach().float().cpu().numpy()
    low, high = rgb.min(), rgb.max()
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"frames: got values from {low:.4g} to {high:.4g} for {path}, expected RGB in [0, 1]; "
            "rescale, or frames.clamp(0, 1) if they are a model's"
        )
    rate = _rate(fps)
    images = np.ascontiguousarray(np.rint(rgb * 255).astype(np.uint8).transpose(1, 2, 3, 0))
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(_CODEC, rate=rate, options=_OPTIONS)
        stream.height, stream.width, stream.pix_fmt = height, width, _PIXELS
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = 1  # BT.709
        codec.color_range = 1  # limited ("MPEG") range
        reformatter = av.video.reformatter.VideoReformatter()
        for image in images:
            frame = reformatter.reformat(
                av.VideoFrame.from_ndarray(image, format="rgb24"),
                format=_PIXELS,
                src_colorspace="ITU709",
                dst_colorspace="ITU709",
                src_color_range="JPEG",
                dst_color_range="MPEG",
                interpolation=_TO_YUV,
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
    frames: list[np.ndarray] = []
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
            if rate is not None:
                decoded = _sample(decoded, fps=rate, shown_for=1 / (stream.average_rate or rate))
            reformatter = av.video.reformatter.VideoReformatter()  # one per file: it is costly to set up
            for frame in decoded:
                if len(frames) == max_frames:
                    at = "" if fps is None else f" at {fps:g} frames per second"
                    raise ValueError(
                        f"{path}: more than {max_frames} frames{at}, expected at most max_frames={max_frames}; "
                        "cut the shot, sample at a lower fps, or raise max_frames"
                    )
                frames.append(_resize(_rgb(frame, reformatter), area=area, multiple=multiple))
    except av.FFmpegError as error:
        raise ValueError(f"{path}: can't be decoded as a video ({error}); is the file complete?") from error
    if not frames:
        raise ValueError(f"{path}: the video stream has no frame, expected at least one")
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).contiguous() / 255


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


# The work per frame is NumPy's: tiny parallel regions, frame after frame, bring PyTorch to a halt on a busy machine.


def _rgb(frame: Any, reformatter: Any) -> UInt8[np.ndarray, "height width 3"]:
    converted = reformatter.reformat(
        frame,
        format="rgb24",
        src_colorspace=frame.colorspace,
        src_color_range=frame.color_range,
        dst_color_range="JPEG",
        interpolation=_TO_RGB,
    )
    return np.rot90(converted.to_ndarray(), frame.rotation // 90)


def _resize(image: UInt8[np.ndarray, "height width 3"], *, area: int | None, multiple: int) -> np.ndarray:
    height, width = image.shape[:2]
    scale = min(1.0, sqrt((area or height * width) / (height * width)))
    new = [max(1, round(n * scale / multiple)) * multiple for n in (height, width)]
    if new == [height, width]:
        return image
    return _average(_average(image, new[0], axis=0), new[1], axis=1).astype(np.float32)


def _average(image: np.ndarray, size: int, *, axis: int) -> np.ndarray:
    """Average each of ``size`` equal parts of an axis, pixels that lie across an edge by their part."""
    old = image.shape[axis]
    edges = np.arange(size + 1) * (old / size)
    pixel = np.minimum(edges.astype(int), old - 1)  # that the edge lies in
    inside = np.expand_dims(edges - pixel, tuple({0, 1, 2} - {axis}))
    before = np.cumsum(image, axis, dtype=np.float64) - image  # sum of all pixels before each
    return np.diff(before.take(pixel, axis) + inside * image.take(pixel, axis), axis=axis) * (size / old)
