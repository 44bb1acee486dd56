"""The keys and values of a scene's history: a cache for each branch of guidance, or one that serves both."""

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from lct_core.backbone import ShotInput
from lct_core.denoiser import Denoiser
from lct_core.generation.common import history_condition
from lct_core.generation.euler import Latents
from lct_core.generation.guidance import branches
from lct_core.generation.history import room
from lct_core.generation.sampling import Sampling
from lct_core.generation.takes import DoneShot, Take
from lct_core.lineage import writing_order
from lct_core.patterns import Pattern


class HeldTake(NamedTuple):
    """The take made last, where the caches hold the keys and values that one of its denoising steps wrote.

    Args:
        step: The step, from 0.
        take: The take, its history chosen.
        results: Its clean latents, by shot.
    """

    step: int
    take: Take
    results: dict[int, Latents]


class BranchCaches:
    """Predicts shots behind cached history, in every branch of guidance, and writes what such a history lacks.

    Shots are named by their index in the scene. In a cache that serves both branches, the global prompt of branch b is
    ``("global", b)``.

    Args:
        model: The scene model.
        sampling: How it generates.
        new_cache: Makes an empty cache, see :class:`Director`.
        first: The global shot, where there is one.
    """

    def __init__(
        self, model: Denoiser, sampling: Sampling, new_cache: Callable[..., Any] | None, first: tuple[int, ...]
    ) -> None:
        self._model, self._guidance, self._window, self._first = model, sampling.on_texts, sampling.window, first
        self._new_cache = new_cache or partial(model.new_cache, storage=sampling.storage, budget=sampling.budget)
        self._shared = self._guidance is not None and self._guidance.shared_history
        self._caches: list[Any] = []
        self.held: HeldTake | None = None

    def made(self, scene: Sequence[ShotInput]) -> list[Any]:
        """The caches; made where there are none yet, with room for the window's longest history in this scene."""
        if not self._caches:
            adapter, names = self._model.adapter, ["shared"] if self._shared else ["positive", "negative"]
            made = []
            for name, row in zip(names, self.texts(scene), strict=False):
                shots = [adapter.shot(shot) for shot in row if shot.latents is not None]
                capacity = room(shots, self._window, text=adapter.traits.text == "joint")
                made.append(self._new_cache(capacity=capacity, branch=name))
            self._caches = made
        return self._caches

    def texts(self, shots: Iterable[ShotInput]) -> list[list[ShotInput]]:
        """Shots with the prompts of every branch of guidance.

        Raises:
            ValueError: for negative prompts that do not fit.
        """
        return branches([*shots], self._guidance, self._model.adapter.traits)

    def predict(
        self,
        row: Mapping[int, ShotInput],
        latents: Mapping[int, Latents],
        levels: Mapping[int, float],
        active: Sequence[int],
        *,
        pattern: str | Pattern,
        behind: Sequence[int] | None,
        text_free: bool = False,
    ) -> list[Latents]:
        """The guided velocity of some shots, in one pass over a row of shots in every branch.

        Args:
            row: The shots, in row order.
            latents: What stands in for their latents; the model gets it in the dtype of those.
            levels: Their noise levels; 0 where none is named.
            active: The shots to return.
            pattern: As :class:`SceneModel` takes it.
            behind: The cached history that they also see; None for a row without a cache.
            text_free: As :class:`SceneModel` takes it; all branches then share one pass.

        Returns:
            Velocities of the active shots, in the dtype of their latents.
        """
        path = self._model.adapter.traits.path
        places = {i: place for place, i in enumerate(row)}
        denoised = [places[i] for i in active]
        t = torch.tensor([levels.get(i, 0.0) for i in row], dtype=torch.float32)
        given = {
            i: replace(shot, latents=latents[i].to(shot.latents.dtype)) if i in latents else shot
            for i, shot in row.items()
        }
        texts = self.texts(given.values())
        caches = [None] * len(texts) if behind is None else self._behind(behind)
        said = []
        for branch, cache in zip(texts[:1] if text_free else texts, caches, strict=False):
            outputs = self._model(branch, t, pattern=pattern, cache=cache, denoised=denoised, text_free=text_free)
            said.append(
                [
                    path.to_velocity(outputs[n].to(latents[i].dtype), latents[i], t[n].expand(len(latents[i])))
                    for i, n in zip(active, denoised, strict=True)
                ]
            )
        return said[0] if self._guidance is None or len(said) == 1 else self._guidance.combine(*said)

    def write(
        self,
        shots: Sequence[int],
        scene: Sequence[ShotInput],
        done: Mapping[int, DoneShot],
        *,
        stale: Collection[int],
        seed: int,
    ) -> None:
        """Write the keys and values of shots that have none yet, and of what those saw: each behind its own history.

        Args:
            shots: What is to be seen.
            scene: The scene.
            done: Its done shots.
            stale: Shots that depended on what was replaced since.
            seed: Of the noise of shots that were made, as history.

        Raises:
            ValueError: for a shot that was made from what is no longer there.
        """
        self.made(scene)
        outdated = {i: [j for j in each.history if j in stale or j not in done] for i, each in done.items()}
        behind = {i: () if outdated[i] else (*self._first, *each.history) for i, each in done.items()}
        written = {
            i for i in (*self._first, *done) if all(self._id(i, b) in cache.ids for b, cache in self._by_branch())
        }
        for i in writing_order(behind, shots, written):
            if outdated.get(i):
                raise ValueError(
                    f"history: shot {i} was made from shots {outdated[i]}, which are no longer what they were; keep it "
                    "again with another history"
                )
            self.forget([i])  # where it was written in one branch alone, by a call that failed in the other
            if i in self._first:
                self._write_global(scene[i])
                continue
            self.predict(
                {i: done[i].shot},
                {i: history_condition(self._model, i, done[i], seed)},
                {i: done[i].level / 1000},
                (),
                pattern=done[i].pattern,
                behind=behind[i],
                text_free=self._shared,
            )
            self.append(i)

    def _write_global(self, shot: ShotInput) -> None:
        """The global shot is clean, and comes first; of a history for both branches, it is the prompt of each."""
        for texts, (branch, cache) in zip(self.texts([shot]), self._by_branch(), strict=True):
            cache.select([])
            self._model(texts, torch.zeros(1, dtype=torch.float32), pattern="context_causal", cache=cache, denoised=())
            cache.append(self._id(0, branch))

    def append(self, *shots: int) -> None:
        """Keep what the last call wrote, or what is held, as these shots' history."""
        for cache in self._caches:
            cache.append(*shots)

    def hold(self, held: HeldTake) -> None:
        """Have the caches hold what the last call wrote, until the take is kept or not."""
        self.held = held
        for cache in self._caches:
            cache.hold()

    def let_go(self) -> None:
        """Forget the keys of a take that was not kept."""
        if self.held is not None:
            for cache in self._caches:
                cache.select([entry.id for entry in cache.shots])
            self.held = None

    def forget(self, shots: Iterable[int]) -> None:
        """Drop the keys of shots; what is left of a selected history closes up."""
        names = {self._id(i, branch) for i in shots for branch in range(2)}
        for cache in self._caches:
            if any(entry.id in names for entry in cache.shots):
                cache.select([entry.id for entry in cache.shots if entry.id not in names])
            if written := [i for i in cache.ids if i in names]:
                cache.drop(*written)

    def fork(self) -> "BranchCaches":
        """Caches of the same shots that go their own way; no take is held."""
        other = copy(self)
        other._caches, other.held = [cache.fork() for cache in self._caches], None
        return other

    def _by_branch(self) -> list[tuple[int, Any]]:
        """Every branch and its cache, which may be that of both."""
        return [(branch, self._caches[0 if self._shared else branch]) for branch in range(len(self.texts([])))]

    def _behind(self, history: Sequence[int]) -> Iterator[Any]:
        """The cache of each branch, with this history selected just before it is used."""
        for branch, cache in self._by_branch():
            ids = [self._id(i, branch) for i in history]
            if [entry.id for entry in cache.shots] != ids:
                cache.select(ids)
            yield cache

    def _id(self, i: int, branch: int) -> Hashable:
        """The name of a shot in a branch's cache."""
        return ("global", branch) if self._shared and i in self._first else i
