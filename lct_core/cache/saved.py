"""A cache in a folder: a file for each shot, and an index that is replaced last."""

from collections.abc import Hashable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lct_core.cache.budget import Budget, SiteSize
from lct_core.cache.holdings import Holdings, Kept
from lct_core.cache.kv_cache import KVCache
from lct_core.cache.rows import Site
from lct_core.cache.shots import CachedShot
from lct_core.cache.tiers import ShotFile, keep_file, release_file, shot_files, write_shot
from lct_core.engine.fingerprint import check_identity, identify
from lct_core.files import make_folder, read_json, write_json
from lct_core.layout import Shot

if TYPE_CHECKING:  # they import the cache
    from lct_core.scene_model import SceneModel

FORMAT = "lct-core KV cache"
VERSION = 1
INDEX = "index.json"


def save(caches: Mapping[str, KVCache], folder: Path, models: Mapping[str, "SceneModel"]) -> None:
    """Write caches that belong together to a folder, see :meth:`KVCache.save`.

    Args:
        caches: By name: one, ``"history"``, or that of each expert.
        folder: Theirs alone.
        models: The model of each.
    """
    folder = folder.absolute()
    for cache in caches.values():
        _check_ids(cache._own)
    identities = {name: identify(model) for name, model in models.items()}
    files = {name: _files(cache._own, folder) for name, cache in caches.items()}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "caches": {name: {"model": identities[name], **_told(caches[name], files[name])} for name in caches},
    }
    write_json(folder / INDEX, content)
    for name, cache in caches.items():
        for i, file in files[name].items():
            keep_file(file.path)
            cache._own.kept[i].files[folder] = file
    for path in shot_files(folder) - {file.path for each in files.values() for file in each.values()}:
        release_file(path)  # of what was saved before, or of a save that was cut short


def load(
    folder: Path, models: Mapping[str, "SceneModel"], *, device: torch.device, budget: Budget | None
) -> dict[str, KVCache]:
    """The caches that were saved to a folder, see :meth:`KVCache.load`.

    Args:
        folder: Where they are.
        models: The model of each, by the names under which they were saved.
        device: Where the models run.
        budget: Of each.
    """
    folder = folder.absolute()
    device = torch.empty(0, device=device).device  # "cuda" is the present one, by its number
    content = read_json(folder / INDEX)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"folder: {folder / INDEX} is not that of a saved KV cache")
    if content["version"] != VERSION:
        raise ValueError(
            f"folder: {folder} has layout version {content['version']}, expected {VERSION}; read it with the version "
            "of lct-core that wrote it"
        )
    told = content["caches"]
    if set(told) != set(models):
        raise ValueError(
            f"folder: {folder} holds {sorted(told)}, expected {sorted(models)}: a model with two experts has a cache "
            "for each, another has one; use the model that wrote it"
        )
    for name, model in models.items():
        check_identity(told[name]["model"], model)
    return {name: _restored(told[name], folder, device, budget) for name in models}


def _files(own: Holdings, folder: Path) -> dict[Hashable, ShotFile]:
    """Every shot's file in a folder; written where there is none."""
    make_folder(folder)
    files = {}
    for i, kept in own.kept.items():
        file = kept.files.get(folder)
        if file is None or not file.path.is_file():
            file = write_shot(folder, i, {key: own.original(kept, key) for key in own.sites})
        files[i] = file
    return files


def _told(cache: KVCache, files: Mapping[Hashable, ShotFile]) -> dict[str, Any]:
    """What the index says of a cache, as JSON can say it."""
    own = cache._own
    return {
        "scheme": own.scheme,
        "pairing": own.pairing,
        "diagonal": None if own.diagonal is None else [str(own.diagonal.dtype), own.diagonal.tolist()],
        "branch": cache.branch,
        "storage": own.storage,
        "capacity": own.capacity,
        "sites": [
            [*key, {**size._asdict(), "dtype": str(size.dtype)}]
            for key, size in ((key, site.size) for key, site in own.sites.items())
        ],
        "history": own.history,
        "shots": [
            {
                **{name: value for name, value in asdict(kept.entry).items() if name not in ("tier", "selected")},
                "errors": kept.errors,
                "file": files[i].path.name,
                "digest": files[i].digest,
            }
            for i, kept in own.kept.items()
        ],
    }


def _restored(told: Mapping[str, Any], folder: Path, device: torch.device, budget: Budget | None) -> KVCache:
    cache = KVCache(capacity=told["capacity"], storage=told["storage"], budget=budget, branch=told["branch"])
    own = cache._own
    own.scheme, own.pairing = told["scheme"], told["pairing"]
    if told["diagonal"] is not None:
        dtype, values = told["diagonal"]
        own.diagonal = torch.tensor(values, dtype=_dtype(dtype), device=device)
    for block, name, size in told["sites"]:
        size = SiteSize(**{**size, "channels": tuple(size["channels"]), "dtype": _dtype(size["dtype"])})
        own.sites[block, name] = Site(size, device)
    own.history = [_id(i) for i in told["history"]]
    for shot in told["shots"]:
        file = ShotFile(folder / shot.pop("file"), shot.pop("digest"), check=True)
        errors = shot.pop("errors")
        shot |= {
            "id": _id(shot["id"]),
            "shot": Shot(**shot["shot"]),
            "level": tuple(shot["level"]),
            "saw": tuple(map(_id, shot["saw"])),
        }
        entry = CachedShot(**shot, tier="disk", selected=shot["id"] in own.history)
        _check_file(file, entry, own)
        own.kept[entry.id] = Kept(entry, file, errors and tuple(errors), {folder: file})
    own.resize()
    return cache


def _check_file(file: ShotFile, entry: CachedShot, own: Holdings) -> None:
    """Refuse a file of another shot."""
    for key, site in own.sites.items():
        size, tokens = site.size, entry.tokens(site.size.space)
        expected = [(size.entries, tokens, size.heads, channels) for channels in size.channels]
        got = [tuple(getattr(x, "values" if own.storage != "native" else "data").shape) for x in file.get(key, ())]
        if got != expected:
            raise ValueError(
                f"{file.path}: it holds {got} for block {key[0]}, site {key[1]!r}, expected {expected}; restore it "
                "from a copy, or write the cache again"
            )


def _check_ids(own: Holdings) -> None:
    if wrong := [i for i in own.kept if not _is_plain(i)]:
        raise ValueError(f"ids: {wrong} can't be saved, expected strings, whole numbers, or tuples of them")


def _is_plain(id: Hashable) -> bool:
    return type(id) in (str, int) or (type(id) is tuple and all(map(_is_plain, id)))


def _id(told: Any) -> Hashable:
    return tuple(map(_id, told)) if isinstance(told, list) else told


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."))
    assert isinstance(dtype, torch.dtype)
    return dtype
