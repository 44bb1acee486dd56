"""Images: what is written comes back, and what can't be read says why."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from lct_core.data import (
    read_image,
    read_video,
    write_image,
    write_video,
)
from tests.data.frames import grey_levels

av = pytest.importorskip("av")


def test_images_come_back(tmp_path: Path) -> None:
    frame = torch.rand(3, 1, 17, 23, generator=torch.Generator().manual_seed(0))
    for path, written in {"a.png": frame, "b.PNG": frame[:, 0].double().requires_grad_()}.items():
        write_image(tmp_path / path, written)
        back = read_image(tmp_path / path)
        assert back.dtype == torch.float32
        assert torch.equal(back, (frame * 255).round() / 255)
        assert torch.equal(read_video(tmp_path / path), back)


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
