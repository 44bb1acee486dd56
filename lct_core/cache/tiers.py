"""Where the keys and values of a shot are: on the model's device, in host memory, in a file."""

import os
import re
import secrets
import weakref
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lct_core.cache.quantize import Format, Quantized, quantize
from lct_core.files import make_folder, read_tensors, write_tensors
from lct_core.rope import Rotation, rotate_into

SiteKey = tuple[int, str]
Stored = Tensor | Quantized
Pair = tuple[Stored, Stored]
AnyStored = TypeVar("AnyStored", Tensor, Quantized, Stored)


class KV(NamedTuple):
    """A shot's keys as they were written, and its values, at one site; None for what stands in the site's row."""

    k: Stored | None
    v: Stored | None

    @property
    def nbytes(self) -> int:
        """Bytes of what does not stand in the row."""
        return sum(x.nbytes for x in self if x is not None)


NOTHING = KV(None, None)


def copied(x: AnyStored, device: torch.device | str, *, pinned: bool = False) -> AnyStored:
    """A copy on a device, or in page-locked host memory. What is on ``meta`` stays there."""

    def copy(x: Tensor) -> Tensor:
        if x.is_meta:
            return torch.empty_like(x)
        return torch.empty(x.shape, dtype=x.dtype, device=device, pin_memory=pinned).copy_(x)

    return Quantized(copy(x.values), copy(x.scales), x.dtype) if isinstance(x, Quantized) else copy(x)


def copies(kv: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Copies of keys and values on a device."""
    keys, values = (copied(x, device) for x in kv)
    return keys, values


def quantized(x: Tensor, format: Format) -> Quantized:
    """A tensor in 8 bits; on ``meta``, what takes as many bytes."""
    if not x.is_meta:
        return quantize(x, format)
    small = quantize(torch.zeros(x.shape[0], x.shape[1], x.shape[2], 1, dtype=x.dtype), format)
    return Quantized(x.new_empty(x.shape, dtype=small.values.dtype), small.scales.to("meta"), x.dtype)


def bring(x: Stored, out: Tensor, by: Rotation | None = None) -> None:
    """Bring keys or values to their place in a row, as the model attends to them; rotated on the way, not copied twice.

    Args:
        x: In any tier.
        out: Where they go. From page-locked memory they come without anyone waiting.
        by: How they are rotated (default: not at all).
    """
    if out.is_meta:  # where there are no values, nothing need be brought or turned
        return
    if isinstance(x, Quantized):
        x.dequantize(out)
    elif x.device == out.device and by is not None:
        rotate_into(x, by, out)
        return
    else:
        mapped = out.device.type == "cuda" and x.device.type == "cpu" and not x.is_pinned()
        out.copy_(x.pin_memory() if mapped else x, non_blocking=True)
    if by is not None:
        rotate_into(out, by, out)


class ShotFile(Mapping[SiteKey, KV]):
    """A shot's keys and values in a file, memory-mapped: read when they are used.

    Deleted when the last reference in this process is released, unless it is part of a saved cache.
    """

    def __init__(self, path: Path, digest: str, *, check: bool = False) -> None:
        self.path, self.digest = path.absolute(), digest
        tensors, about = read_tensors(path, digest=digest if check else None)
        self._kv = _unnamed(tensors, about)
        _users[self.path] += 1
        weakref.finalize(self, _leave, self.path, os.getpid())

    def __getitem__(self, key: SiteKey) -> KV:
        return self._kv[key]

    def __iter__(self) -> Iterator[SiteKey]:
        return iter(self._kv)

    def __len__(self) -> int:
        return len(self._kv)

    def __reduce__(self) -> tuple[Any, ...]:
        return ShotFile, (self.path, self.digest)

    def __deepcopy__(self, memo: Any) -> "ShotFile":
        return self


def write_shot(folder: Path, id: Hashable, kvs: Mapping[SiteKey, Pair]) -> ShotFile:
    """Write a shot to a new file, which is deleted when the last reference to it is released.

    Raises:
        OSError: where it can't be written.
    """
    make_folder(folder)
    readable = re.sub(r"[^A-Za-z0-9]+", "-", str(id)).strip("-")[:40]
    path = folder / f"{readable or 'shot'}-{secrets.token_hex(6)}.safetensors"
    digest = write_tensors(path, *_named(kvs))
    _scratch.add(path.absolute())
    return ShotFile(path, digest)


def shot_files(folder: Path) -> set[Path]:
    """The files in a folder that :func:`write_shot` has written, or begun to."""
    return {path for path in folder.absolute().iterdir() if _NAME.fullmatch(path.name)}


def keep_file(path: Path) -> None:
    """Let a file stay: it is part of a saved cache."""
    _scratch.discard(path.absolute())


def release_file(path: Path) -> None:
    """Delete a file that no saved cache has any more: when its last reference is released, or now if there is none."""
    path = path.absolute()
    if path in _users:
        _scratch.add(path)
    else:
        path.unlink(missing_ok=True)


_NAME = re.compile(r"[A-Za-z0-9-]+-[0-9a-f]{12}(\.partial)?\.safetensors")  # of a shot's file
_users: Counter[Path] = Counter()  # references to each file, in this process
_scratch: set[Path] = set()  # the files that are deleted when their last reference is released


def _leave(path: Path, process: int) -> None:
    if process != os.getpid():
        return
    _users[path] -= 1
    if not _users[path]:
        del _users[path]
        if path in _scratch:
            _scratch.discard(path)
            path.unlink(missing_ok=True)


def _named(kvs: Mapping[SiteKey, Pair]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Keys and values by the names that they have in a file, and the dtypes of those in 8 bits."""
    tensors: dict[str, Tensor] = {}
    about: dict[str, str] = {}
    for (block, site), kv in kvs.items():
        for kind, x in zip("kv", kv, strict=True):
            name = f"{block}/{site}/{kind}"
            if isinstance(x, Quantized):
                about[name] = str(x.dtype).removeprefix("torch.")
                tensors |= {f"{name}/values": x.values, f"{name}/scales": x.scales}
            else:
                tensors[name] = x
    return tensors, about


def _unnamed(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> dict[SiteKey, KV]:
    stored: dict[str, Stored] = {name: x for name, x in tensors.items() if name.count("/") == 2}
    for name, dtype in about.items():
        stored[name] = Quantized(tensors[f"{name}/values"], tensors[f"{name}/scales"], getattr(torch, dtype))
    keys = sorted({tuple(name.split("/")[:2]) for name in stored})
    return {(int(block), site): KV(*(stored[f"{block}/{site}/{kind}"] for kind in "kv")) for block, site in keys}
