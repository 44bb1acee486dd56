"""Files that are written whole or not at all, and read without running anything in them."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
}  # the dtypes of keys, values and scales, as safetensors writes them
_AGAIN = "restore it from a copy, or write it again"


def make_folder(path: Path) -> None:
    """Make a folder, and those that it is in, where there is none.

    Raises:
        NotADirectoryError: where there is a file of that name.
        OSError: where it can't be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            errno.ENOTDIR, f"{path}: there is a file in the place of a folder; use another folder, or move the file"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file beside another, whose place it takes only when all is on the disk; on an error nothing changes.

    Args:
        path: The file to replace, or to make; its folder must exist.

    Yields:
        Where to write inside the ``with``: a name with the same ending.
    """
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """Write tensors to a safetensors file, in place of an older one only when all is on the disk.

    One tensor at a time is brought over from a GPU, or made contiguous.

    Args:
        path: File to write; its folder must exist.
        tensors: By name: float64, float32, float16, bfloat16, float8_e4m3fn or int8, of any shape.
        about: What else to keep, by name.

    Returns:
        The SHA-256 of the file's bytes, in hex: what :func:`read_tensors` checks.

    Raises:
        ValueError: for another dtype.
        OSError: where the file can't be written, such as a full disk; an older file is left as it was.
    """
    if other := {name: x.dtype for name, x in tensors.items() if x.dtype not in _NAMES}:
        raise ValueError(f"tensors: got {other}, expected {', '.join(map(str, _NAMES))}")
    header: dict[str, Any] = {"__metadata__": dict(about)} if about else {}
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))  # so that each one is aligned
    end = 0
    for name, x in ordered:
        start, end = end, end + x.nbytes
        header[name] = {"dtype": _NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()

    def parts() -> Iterable[bytes | memoryview]:
        yield from (len(head).to_bytes(8, "little"), head)
        yield from (_bytes(x) for _, x in ordered)

    _replace(Path(path), parts(), 8 + len(head) + end, digest.update)
    return digest.hexdigest()


def read_tensors(path: str | Path, *, digest: str | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Map the tensors of a safetensors file into memory: no copy, and read from the disk when they are first used.

    Writing to them changes memory only, never the file.

    Args:
        path: The file.
        digest: What :func:`write_tensors` returned for it; checked by reading the file through once (default: no check
            but that of the file's form and length).

    Returns:
        The tensors by name, on the CPU, and what else was kept with them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, edited, or no safetensors file.
    """
    from safetensors import safe_open

    path = _existing(path)
    if digest is not None:
        with path.open("rb") as content:
            got = hashlib.file_digest(content, "sha256").hexdigest()
        if got != digest:
            raise ValueError(
                f"{path}: truncated or edited since it was written: its SHA-256 is {got}, expected {digest}; {_AGAIN}"
            )
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
            about = dict(file.metadata() or {})
    except OSError:
        raise
    except Exception as error:  # the bytes of a broken file can fail in any way
        raise ValueError(f"{path}: truncated, edited, or no safetensors file ({error}); {_AGAIN}") from error
    return tensors, about


def write_json(path: str | Path, content: Any) -> None:
    """Write what JSON can say to a file, in place of an older one only when all is on the disk.

    It is written with its SHA-256, so that :func:`read_json` tells an edited file; floats come back exactly.

    Raises:
        TypeError, ValueError: for what JSON can't say, NaN and infinity among it.
        OSError: as :func:`write_tensors` does.
    """
    text = json.dumps({"sha256": _digest(content), "content": content}, indent=1).encode()
    _replace(Path(path), [text, b"\n"], len(text) + 1)


def read_json(path: str | Path) -> Any:
    """Read what :func:`write_json` wrote; tuples come back as lists.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, edited, or of another kind.
    """
    path = _existing(path)
    try:
        whole = json.loads(path.read_bytes())
        content, digest = whole["content"], whole["sha256"]
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{path}: truncated, edited, or not written by this library ({error!r}); {_AGAIN}") from error
    if digest != _digest(content):
        raise ValueError(f"{path}: edited since it was written: its content has another SHA-256 than it says; {_AGAIN}")
    return content


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, f"{path}: no such file; restore it from a copy, or check the folder")
    return path


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, allow_nan=False).encode()).hexdigest()


def _bytes(x: Tensor) -> memoryview:
    return x.detach().cpu().reshape(-1).view(torch.uint8).numpy().data


def _replace(
    path: Path,
    parts: Iterable[bytes | memoryview],
    size: int,
    watch: Callable[[bytes | memoryview], object] = lambda _: None,
) -> None:
    """Write parts of so many bytes in all in the place of a file, and say what they need where the disk is full."""
    try:
        with replacing(path) as partial, partial.open("wb") as file:
            for part in parts:
                watch(part)
                file.write(part)
                del part  # before the next one is made
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            error.errno,
            f"{path}: the disk is full: it needs {size} bytes, and {free} are free; what was written before is "
            "whole; free some space, or use a folder on another disk",
        ) from error


def _sync(folder: Path) -> None:
    """Make the names in a folder last through a loss of power, where the system can.

    Windows and some network file systems can't; the file is in its place by then, which no error may deny.
    """
    with suppress(OSError, AttributeError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
