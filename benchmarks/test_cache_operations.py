"""What is done to the KV cache between shots."""

import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import provenance, timing
from benchmarks.filled_cache import DEVICES, QUICK, SITE, Pair, Publish, Size, fill, kind, writing
from benchmarks.generation_cost import scene_of
from benchmarks.test_generation import SMALL, model_of
from lct_core import KVCache, Layout, Shot

OPERATED = {
    "cpu": Size(6, 4, 64, torch.float32, Shot(32, (12, 8, 8)), 10),
    "cuda": Size(8, 24, 128, torch.bfloat16, Shot(576, (1, 30, 30)), 10),
}


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_what_is_done_between_shots(
    device: str, quick: bool, tmp_path: Path, benchmark: BenchmarkFixture, publish: Publish
) -> None:
    """Selecting, forking, saving and loading nine shots, beside a plain copy, or file, of as many bytes."""
    size = QUICK if quick else OPERATED[device]
    generator = torch.Generator(device).manual_seed(0)
    scene = scene_of(size.shot, 9)
    model = model_of(SMALL, size.dtype, device)  # which only signs what is saved
    cache = KVCache(capacity=Layout([[*scene, size.shot]]).tokens)
    fill(cache, scene, size, device, generator)
    current = [size.pair(size.shot.tokens, device, generator) for _ in range(size.depth)]
    ids = list(cache.ids)
    others = [ids[0], *reversed(ids[1:])]

    def call(of: KVCache) -> list[Pair]:
        """Write the current shot behind a history, and see both."""
        with writing(of, size.shot, size) as write:
            return [write((layer, SITE), "tokens", *pair) for layer, pair in enumerate(current)]

    def selecting(*, reposition: bool) -> timing.Run:
        cache.select(ids)
        return lambda: cache.select(others, reposition=reposition)

    def forked() -> timing.Run:
        fork = cache.fork()
        call(cache)  # goes on in the rows that are shared
        return lambda: call(fork)

    original = [[x.clone() for x in views] for views in call(cache)]
    history = [x[:, : -size.shot.tokens].flatten() for pair in original for x in pair]
    everything = torch.cat([x.view(torch.uint8) for x in history])
    copy, content, saved = torch.empty_like(everything), everything.cpu().numpy(), tmp_path / "saved"
    cache.save(saved, model)

    def plain_write() -> None:
        with (tmp_path / "plain").open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def saving() -> timing.Run:
        shutil.rmtree(folder := tmp_path / "again", ignore_errors=True)
        return lambda: cache.save(folder, model)

    def loading() -> list[Pair]:
        return call(KVCache.load(saved, model, device=device))

    def reading() -> None:
        for path in saved.iterdir():
            torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).to(device)

    def same(of: KVCache) -> None:
        pairs = zip(call(of), original, strict=True)
        assert all(torch.equal(*each) for pair in pairs for each in zip(*pair, strict=True)), "not the same: not timed"

    cache.select(others)
    cache.select(ids)
    forked()
    for each in (cache, cache.fork(), KVCache.load(saved, model, device=device)):
        same(each)

    contenders = {
        "copy": timing.Contender(lambda: lambda: copy.copy_(everything)),
        "select": timing.Contender(partial(selecting, reposition=False)),
        "select and move": timing.Contender(partial(selecting, reposition=True)),
        "fork": timing.Contender(lambda: cache.fork),
        "first write of a fork": timing.Contender(forked),
        "plain file": timing.Contender(lambda: plain_write),
        "save": timing.Contender(saving),
        "plain read": timing.Contender(lambda: reading),
        "load": timing.Contender(lambda: loading),
    }
    warmup = 1
    seconds = timing.interleave(contenders, warmup=warmup, rounds=size.rounds, device=device)
    benchmark.pedantic(contenders["select"].prepare(), rounds=1)
    times, nbytes = timing.measured(seconds, contenders), everything.nbytes
    beside = {"save": "plain file", "load": "plain read"}
    against = {
        name: timing.ratio(seconds[name], seconds[beside.get(name, "copy")])
        for name in contenders
        if name not in ("copy", *beside.values())
    }
    publish(
        provenance.record(
            f"cache-operations-{device}",
            device=device,
            warmup=warmup,
            rounds=size.rounds,
            shape={**size.told(), "shots": 9, "bytes": nbytes},
            times=times,
            comparisons=[
                timing.Comparison(f"{name}: time / {beside.get(name, 'copy')}", value)
                for name, value in against.items()
            ],
            tables=[
                {
                    "title": f"What is done between shots, {kind(device)}",
                    "about": f"With nine shots, {nbytes / 1e6:.0f} MB. Files are in the page cache when they are read.",
                    "rows": [
                        {
                            "What": name,
                            "Milliseconds": 1e3 * times[name]["seconds"],
                            "GB/s": nbytes / times[name]["seconds"] / 1e9,
                            "Times as long": value.median,
                            "as a": {"copy": "plain copy"}.get(peer := beside.get(name, "copy"), peer),
                        }
                        for name, value in against.items()
                    ],
                }
            ],
        )
    )
