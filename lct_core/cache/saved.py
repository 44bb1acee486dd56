"""A cache in a folder: a file for each shot, and an index that is replaced last."""

from collections.abc import Collection, Hashable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lct_core.cache.budget import Budget, SiteSize
from lct_core.cache.holdings import HeldShot, Holdings
from lct_core.cache.rows import SiteRows
from lct_core.cache.shots import CachedShot
from lct_core.cache.tiers import ShotFile, keep_file, release_file, shot_files, write_shot
from lct_core.files import make_folder, read_json, write_json
from lct_core.layout import Shot

FORMAT = "lct-core KV cache"
VERSION = 1
INDEX = "index.json"


def save(caches: Mapping[str, Holdings], folder: Path, fingerprints: Mapping[str, Any]) -> None:
    """Write caches that belong together to a folder, see :meth:`KVCache.save`.

    Args:
        caches: By name: one, ``"history"``, or that of each expert.
        folder: Theirs alone.
        fingerprints: Of the model of each.
    """
    folder = folder.absolute()
    for here in caches.values():
        if wrong := [i for i in here.kept if not _is_plain(i)]:
            raise ValueError(f"ids: {wrong} can't be saved, expected strings, whole numbers, or tuples of them")
    files = {name: _files(here, folder) for name, here in caches.items()}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "caches": {name: {"model": fingerprints[name], **_told(here, files[name])} for name, here in caches.items()},
    }
    write_json(folder / INDEX, content)
    for name, here in caches.items():
        for i, file in files[name].items():
            keep_file(file.path)
            here.kept[i].files[folder] = file
    for path in shot_files(folder) - {file.path for each in files.values() for file in each.values()}:
        release_file(path)  # of what was saved before, or of a save that was cut short


def read_index(folder: Path, names: Collection[str]) -> dict[str, Any]:
    """What a folder's index says of its caches, by name.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: where it is something else, of another layout version, or of caches of other names.
    """
    folder = folder.absolute()
    content = read_json(folder / INDEX)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"folder: {folder / INDEX} is not that of a saved KV cache")
    if content["version"] != VERSION:
        raise ValueError(
            f"folder: {folder} has layout version {content['version']}, expected {VERSION}; read it with the version "
            "of lct-core that wrote it"
        )
    told: dict[str, Any] = content["caches"]
    if set(told) != set(names):
        raise ValueError(
            f"folder: {folder} holds {sorted(told)}, expected {sorted(names)}: a model with two experts has a cache "
            "for each, another has one; use the model that wrote it"
        )
    return told


def restored(told: Mapping[str, Any], folder: Path, device: torch.device, budget: Budget) -> Holdings:
    """One cache, as its index tells of it, see :meth:`KVCache.load`."""
    folder = folder.absolute()
    device = torch.empty(0, device=device).device  # "cuda" is the present one, by its number
    here = Holdings(told["capacity"], told["storage"], budget, told["branch"])
    here.scheme, here.pairing = told["scheme"], told["pairing"]
    if told["diagonal"] is not None:
        dtype, values = told["diagonal"]
        here.diagonal = torch.tensor(values, dtype=_dtype(dtype), device=device)
    for block, name, size in told["sites"]:
        size = SiteSize(**{**size, "channels": tuple(size["channels"]), "dtype": _dtype(size["dtype"])})
        here.sites[block, name] = SiteRows(size, device)
    here.history = [_id(i) for i in told["history"]]
    for shot in told["shots"]:
        file = ShotFile(folder / shot.pop("file"), shot.pop("digest"), check=True)
        errors = shot.pop("errors")
        shot |= {
            "id": _id(shot["id"]),
            "shot": Shot(**shot["shot"]),
            "level": tuple(shot["level"]),
            "saw": tuple(map(_id, shot["saw"])),
        }
        entry = CachedShot(**shot, tier="disk", selected=shot["id"] in here.history)
        _check_file(file, entry, here)
        here.kept[entry.id] = HeldShot(entry, file, errors and tuple(errors), {folder: file})
    here.resize()
    return here


def _files(here: Holdings, folder: Path) -> dict[Hashable, ShotFile]:
    """Every shot's file in a folder; written where there is none."""
    make_folder(folder)
    files = {}
    for i, kept in here.kept.items():
        file = kept.files.get(folder)
        if file is None or not file.path.is_file():
            file = write_shot(folder, i, {key: here.original(kept, key) for key in here.sites})
        files[i] = file
    return files


def _told(here: Holdings, files: Mapping[Hashable, ShotFile]) -> dict[str, Any]:
    """What the index says of a cache, as JSON can say it."""
    return {
        "scheme": here.scheme,
        "pairing": here.pairing,
        "diagonal": None if here.diagonal is None else [str(here.diagonal.dtype), here.diagonal.tolist()],
        "branch": here.branch,
        "storage": here.storage,
        "capacity": here.capacity,
        "sites": [[*key, {**site.size._asdict(), "dtype": str(site.size.dtype)}] for key, site in here.sites.items()],
        "history": here.history,
        "shots": [
            {
                **{name: value for name, value in asdict(kept.entry).items() if name not in ("tier", "selected")},
                "errors": kept.errors,
                "file": files[i].path.name,
                "digest": files[i].digest,
            }
            for i, kept in here.kept.items()
        ],
    }


def _check_file(file: ShotFile, entry: CachedShot, here: Holdings) -> None:
    """Refuse a file of another shot."""
    for key, site in here.sites.items():
        size, tokens = site.size, entry.tokens(site.size.space)
        expected = [(size.entries, tokens, size.heads, channels) for channels in size.channels]
        got = [tuple(getattr(x, "values" if here.storage != "native" else "data").shape) for x in file.get(key, ())]
        if got != expected:
            raise ValueError(
                f"{file.path}: it holds {got} for block {key[0]}, site {key[1]!r}, expected {expected}; restore it "
                "from a copy, or write the cache again"
            )


def _is_plain(id: Hashable) -> bool:
    return type(id) in (str, int) or (type(id) is tuple and all(map(_is_plain, id)))


def _id(told: Any) -> Hashable:
    return tuple(map(_id, told)) if isinstance(told, list) else told


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."))
    assert isinstance(dtype, torch.dtype)
    return dtype
