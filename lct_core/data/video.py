"""Video and image files to frames and back: RGB in [0, 1], ``[channels, frames, height, width]``.

An image is one frame. PyAV does the work. It is imported when a file is read or written, not before.
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
# Without x264's lookahead the same frames give the same file: on frames of some sizes, 24 x 24 and 256 x 448 among
# them, it reads memory that nobody wrote (some of the files differed; none of 8,400 of 14 sizes without it).
_OPTIONS = {"crf": "1", "preset": "veryfast", "rc-lookahead": "0", "mbtree": "0"}
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
    if not are_frames(frames):
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
    images = _to_bytes(frames, name="frames", path=path)
    rate = _rate(fps)
    with av.open(f"file:{path}", "w", format="mp4") as container:
        stream = container.add_stream(_CODEC, rate=rate, options=_OPTIONS)
        stream.height, stream.width, stream.pix_fmt = height, width, _PIXELS
        codec = stream.codec_context
        codec.thread_count = 1  # with several, what is written depends on the machine and on what else it does
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


def write_image(path: str | Path, frame: Float[Tensor, "3 1 height width"] | Float[Tensor, "3 height width"]) -> None:
    """Write one frame as a PNG file of 8 bits per colour: ``read_image`` gives it back, rounded to 1/255.

    Args:
        path: File to write, its name ending in ``.png``; one that is there is replaced. The folder must exist.
        frame: RGB in [0, 1], floating point.

    Raises:
        ImportError: PyAV is not installed.
        ValueError: another ending, or a frame of another shape, type or value range.
    """
    av = _import_av()
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"path: got {path}, expected a name that ends in .png (lossless), the format that is written")
    frames = frame[:, None] if frame.ndim == 3 else frame
    if not are_frames(frames) or frames.shape[1] != 1:
        raise ValueError(
            f"frame: got shape {list(frame.shape)} of {frame.dtype} for {path}, "
            "expected floating point [3, 1, height, width] or [3, height, width]; write_video writes several frames"
        )
    picture = av.VideoFrame.from_ndarray(_to_bytes(frames, name="frame", path=path)[0], format="rgb24")
    codec = av.CodecContext.create("png", "w")
    codec.width, codec.height, codec.pix_fmt, codec.time_base = picture.width, picture.height, "rgb24", Fraction(1)
    path.write_bytes(b"".join(bytes(packet) for packet in [*codec.encode(picture), *codec.encode(None)]))


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
    Rotation that a file asks its player for (phones) is applied, mirroring is not.

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
            ``max_frames`` frames, transparent pixels, or pixels that are not square.
    """
    check_reading(area=area, multiple=multiple, fps=fps, max_frames=max_frames)
    at = "" if fps is None else f" at {fps:g} frames per second"
    return _read(
        Path(path),
        what="a video",
        area=area,
        multiple=multiple,
        rate=None if fps is None else _rate(fps),
        max_frames=max_frames,
        too_many=f"more than {max_frames} frames{at}, expected at most max_frames={max_frames}; "
        "cut the shot, sample at a lower fps, or raise max_frames",
        options={},  # leave damage to FFmpeg, which repairs what it can
    )


def read_image(path: str | Path, *, area: int | None = None, multiple: int = 1) -> Float[Tensor, "3 1 height width"]:
    """Read a PNG, JPEG or WebP file as one frame of float32 RGB in [0, 1].

    As in ``read_video``, the frame is resized by exact area averaging, and rotation that the file asks its viewer for
    (EXIF, phones) is applied, mirroring is not. Colours are taken as they are stored, at 8 bits: ICC profiles are not
    applied. Grey becomes RGB; an alpha channel must be opaque.

    Args:
        path: An image that FFmpeg decodes.
        area: Pixels to shrink to, see ``read_video``.
        multiple: What height and width are a multiple of, see ``read_video``.

    Raises:
        ImportError: PyAV is not installed.
        FileNotFoundError: there is no such file.
        ValueError: an argument out of range; a file that can't be decoded, is cut off, or has no picture, more than one
            (a video or an animation), transparent pixels, or pixels that are not square.
    """
    check_reading(area=area, multiple=multiple)
    path = Path(path)
    frame = _read(
        path,
        what="an image",
        area=area,
        multiple=multiple,
        rate=None,
        max_frames=1,
        too_many="more than one frame, expected an image; read_video reads videos and animations",
        options={"err_detect": "explode"},  # else FFmpeg paints over what is damaged
    )
    if _is_jpeg_cut_off(path.read_bytes()):
        raise ValueError(
            f"{path}: can't be decoded as an image (the end of the JPEG is missing); is the file complete?"
        )
    return frame


def check_reading(
    *, area: int | None = None, multiple: int = 1, fps: float | None = None, max_frames: int = 125
) -> None:
    """Raise a ValueError if one of the arguments of ``read_video`` is out of range."""
    for name, value in {"area": area, "multiple": multiple, "max_frames": max_frames}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    if fps is not None:
        _rate(fps)


def are_frames(frames: Tensor) -> bool:
    """Whether a tensor is floating point and ``[3, frames, height, width]``, without an empty axis."""
    return frames.ndim == 4 and frames.shape[0] == 3 and 0 not in frames.shape and frames.is_floating_point()


def _to_bytes(frames: Tensor, *, name: str, path: str | Path) -> UInt8[np.ndarray, "frames height width 3"]:
    rgb = frames.detach().float().cpu().numpy()
    low, high = rgb.min(), rgb.max()
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"{name}: got values from {low:.4g} to {high:.4g} for {path}, expected RGB in [0, 1]; "
            f"rescale, or {name}.clamp(0, 1) if they are a model's"
        )
    return np.ascontiguousarray(np.rint(rgb * 255).astype(np.uint8).transpose(1, 2, 3, 0))


def _read(
    path: Path,
    *,
    what: str,
    area: int | None,
    multiple: int,
    rate: Fraction | None,
    max_frames: int,
    too_many: str,
    options: dict[str, str],
) -> Float[Tensor, "3 frames height width"]:
    av = _import_av()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected {what}")
    frames: list[np.ndarray] = []
    try:
        # FFmpeg would take some names for a protocol's ("pipe:1") or, of images, for a pattern ("%d.png").
        with av.open(f"file:{path}", options={"pattern_type": "none"}) as container:
            if not container.streams.video:
                kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
                raise ValueError(f"{path}: no video stream (streams found: {kinds}), expected {what}")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            stream.codec_context.options = options
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
                    raise ValueError(f"{path}: {too_many}")
                image = _rgb(frame, reformatter)
                if image is None:
                    raise ValueError(
                        f"{path}: has transparent pixels, expected opaque ones; flatten it onto a background first"
                    )
                frames.append(_resize(image, area=area, multiple=multiple))
    except av.FFmpegError as error:
        raise ValueError(f"{path}: can't be decoded as {what} ({error}); is the file complete?") from error
    if not frames:
        raise ValueError(f"{path}: the video stream has no frame, expected at least one")
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).contiguous() / 255


def _is_jpeg_cut_off(data: bytes) -> bool:
    """Whether a JPEG lacks its end, which FFmpeg doesn't mind. Thumbnails, in the segments before, have their own."""
    if data[:2] != b"\xff\xd8":
        return False
    at = 2
    while data[at + 1 : at + 2] not in (b"\xda", b""):  # until the scan starts, or the data ends
        filler = data[at + 1] == 0xFF
        at += 1 if filler else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return b"\xff\xd9" not in data[at:]


def _import_av() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise ImportError("reading and writing videos and images needs PyAV: pip install lct-core[video]") from error
    return av


def _rate(fps: float) -> Fraction:
    rate = Fraction(fps).limit_denominator(1001) if isfinite(fps) else Fraction(0)
    if rate <= 0:
        raise ValueError(f"fps: got {fps}, expected a positive number of frames per second, at least 1/1001")
    return rate


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


def _rgb(frame: Any, reformatter: Any) -> UInt8[np.ndarray, "height width 3"] | None:
    """Turn a decoded frame into an upright RGB image; None if it has pixels that are not opaque."""
    has_alpha = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    converted = reformatter.reformat(
        frame,
        format="rgba" if has_alpha else "rgb24",
        src_colorspace=frame.colorspace,
        src_color_range=frame.color_range,
        dst_color_range="JPEG",
        interpolation=_TO_RGB,
    )
    pixels = converted.to_ndarray()
    if has_alpha and pixels[..., 3].min() < 255:
        return None
    return np.rot90(pixels[..., :3], frame.rotation // 90)


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
