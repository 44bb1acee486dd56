"""The director of a session, in memory: what it holds follows from the book, whatever was undone or killed."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lct_core.backbone import ShotInput
from lct_core.cache import Budget
from lct_core.codec import Codec
from lct_core.denoiser import Denoiser
from lct_core.files import read_json, write_json
from lct_core.generation import Director, Take, start_scene
from lct_core.generation.euler import Callback
from lct_core.noise import shot_noise
from lct_core.script import SHOT_CUT
from lct_core.session.archive import Archive
from lct_core.session.book import Book, SessionTake

_WRITTEN = "written.json"


class LiveDirector:
    """A director who can be brought to where a book stands.

    Keys and values are right for as long as nothing is replaced that they depend on, :meth:`Book.origin`: those of
    other shots are dropped, and written again when they are needed, in the same pass, so that they are the same.

    Args:
        model: The scene model, or the experts that share out its levels.
        codec: Its codec.
        archive: The takes' latents.
        folder: Where keys and values are saved, those of each branch of guidance by themselves.
        budget: Of each cache; without a folder of its own, its files are where they would be saved.
    """

    def __init__(self, model: Denoiser, codec: Codec, archive: Archive, folder: Path, budget: Budget | None) -> None:
        self._model, self._codec, self._archive, self._folder, self._budget = model, codec, archive, folder, budget
        self._director: Director | None = None
        self._holds: dict[int, dict[int, int]] = {}  # the origin of every shot that the director has
        weights = next(model.adapter.model.parameters())
        self._device, self._dtype = weights.device, weights.dtype

    def follow(self, book: Book) -> Director:
        """The director, with the kept shots of the present branch but for the stale ones.

        Raises:
            ValueError: for settings that generation refuses, and damaged files.
        """
        director, self._director = self._director, None  # until all is as it should be
        if resumed := director is None:
            director, self._holds = self._new(book), {}
        stale = book.stale
        origins = {n: book.origin(n) for n in book.state.kept if n not in stale}
        for n in [n for n, origin in self._holds.items() if origins.get(n) != origin]:
            director.discard(book.index(n))
            del self._holds[n]
        for n in sorted(book.state.kept):
            if n in self._holds or (n in stale and book.index(n) < len(director.scene)):
                continue
            take = book.kept(n)
            latents = self._archive.latents(take, n)
            director.revise(book.index(n), self._input(book, take, n, latents.shape))
            if n not in stale:  # else it only holds its place
                self._hold(director, book, n, latents)
                self._holds[n] = origins[n]
        if resumed:
            self._load(director, book)
        self._director = director
        return director

    def shoot(self, book: Book, take: SessionTake, callback: Callback | None) -> dict[int, Tensor]:
        """Make a take's shots; their latents, by shot."""
        director = self.follow(book)
        shape = (1, *self._codec.latent_shape(*book.settings.size))
        inputs = {book.index(n): self._input(book, take, n, shape) for n in take.shots}
        history = tuple(map(book.index, take.history))
        run = Take(tuple(inputs), history=history, cached=take.cached, pattern=book.settings.pattern)
        self._director = None  # nobody knows in what state an interruption would leave it
        for i, shot in inputs.items():
            director.revise(i, shot)
        results = director.shoot(run, callback=callback)
        self._director = director
        return {n: results[book.index(n)] for n in take.shots}

    def save(self, book: Book) -> bool:
        """Write the keys and values that there are to disk; :meth:`follow` finds them there in another process.

        Returns:
            Whether there are any in memory; else what is on disk is all.

        Raises:
            OSError: where they can't be written.
        """
        if self._director is None:
            return False
        director = self.follow(book)
        self._folder.mkdir(exist_ok=True)
        write_json(self._folder / _WRITTEN, [])  # what it said held for what was written before it
        for cache in director.caches:
            cache.save(self._folder / cache.branch, self._model)
        write_json(self._folder / _WRITTEN, [[n, [*origin.items()]] for n, origin in self._holds.items()])
        return True

    def _new(self, book: Book) -> Director:
        settings = book.settings
        scene = start_scene(
            book.script, self._codec, settings.size, seed=settings.seed, device=self._device, dtype=self._dtype
        )

        def new_cache(*, capacity: int, branch: str) -> Any:
            near = _budget_of(branch, self._budget, self._folder)
            return self._model.new_cache(
                capacity=capacity, storage=settings.sampling.storage, budget=near, branch=branch
            )

        sampling = settings.sampling.encoded(self._codec)
        return Director(self._model, scene, sampling=sampling, seed=settings.seed, new_cache=new_cache)

    def _hold(self, director: Director, book: Book, n: int, latents: Tensor) -> None:
        take, i = book.kept(n), book.index(n)
        if take.file:
            director.give(i, latents, t_c=take.t_c)
        else:
            behind = tuple(map(book.index, take.behind(n)))
            director.keep({i: latents}, Take((i,), history=behind), t_c=take.t_c)

    def _load(self, director: Director, book: Book) -> None:
        """Take over what was saved of the keys and values that are still right."""
        if not (self._folder / _WRITTEN).is_file():
            return
        written = {n: dict(origin) for n, origin in read_json(self._folder / _WRITTEN)}
        good = {book.index(n) for n, origin in written.items() if self._holds.get(n) == origin}
        if not good:
            return  # nor are both branches there, where saving was cut short
        for number, branch in enumerate([cache.branch for cache in director.caches]):
            try:
                budget = _budget_of(branch, self._budget, self._folder)
                cache = self._model.load_cache(self._folder / branch, device=self._device, budget=budget)
            except (ValueError, OSError) as error:
                raise ValueError(
                    f"{error}; if its files are damaged, remove {self._folder}: what it held is made again"
                ) from error
            cache.drop(*(entry.id for entry in cache.held if entry.shot.role == "shot" and entry.id not in good))
            cache.reposition()  # what is left of the selected history closes up, as if it had just been selected
            director.caches[number] = cache

    @torch.no_grad()
    def _input(self, book: Book, take: SessionTake, n: int, shape: Sequence[int]) -> ShotInput:
        """A shot as a take makes it: its prompt, and its noise."""
        said = take.script_shot(n)
        text = self._codec.text(f"{SHOT_CUT} {said.text}" if said.cut else said.text)
        noise = shot_noise(
            shape, seed=take.seed, step=take.draw, scene=0, shot=n - 1, device=self._device, dtype=self._dtype
        )
        return ShotInput(text=text[None].to(self._device, self._dtype), latents=noise)


def _budget_of(branch: str, budget: Budget | None, folder: Path) -> Budget | None:
    """A budget whose files go where the branch's cache is saved, unless it names a folder."""
    return budget and replace(budget, folder=budget.folder or folder / branch)
