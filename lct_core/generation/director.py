"""A scene in the making: takes of it are shot, looked at, and kept or not (paper, 3.3, 3.4 and 4.3)."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from heapq import merge
from itertools import count
from typing import Any, NamedTuple

import torch

from lct_core.backbone.inputs import ShotInput
from lct_core.engine.scene import with_dummy_video
from lct_core.experts import Experts, new_cache
from lct_core.generation.common import (
    Levels,
    as_condition,
    check_given,
    check_levels,
    check_scene,
    history_noise,
    level_of,
    noisy_parts,
    predict,
)
from lct_core.generation.done import Kept, dependents
from lct_core.generation.euler import Callback, Latents
from lct_core.generation.guidance import Guidance, branches
from lct_core.generation.history import choose, recent, room
from lct_core.generation.schedulers import Steps, call_levels, denoise
from lct_core.generation.takes import Take, in_order
from lct_core.generation.write import Write, check_write, nearest
from lct_core.patterns import Pattern
from lct_core.scene_model import SceneModel


class _Held(NamedTuple):
    """Keys of one call of a take, which the caches hold until it is kept or not."""

    call: int
    take: Take
    results: dict[int, Latents]


class Director:
    """Makes a scene take by take.

    A take is shot (:meth:`shoot`), and kept (:meth:`keep`) or not; what is kept can be history to others. A shot's keys
    and values are written when a cached take first needs them: behind the history that the shot was made from, in a
    pass of its own, noised to its t_c (paper, 4.2); guidance keeps a second cache, written with the negative prompts::

        director = Director(model, scene, t_c=300)
        first = Take((0, 1), cached=False, pattern="bidirectional")
        director.keep(director.shoot(first), first)
        third = Take((2,), history=(1,))
        director.keep(director.shoot(third), third)
        director.done[2]

    Args:
        model: A scene model, or the experts that share out its levels.
        scene: The shots; their latents are the noise that they start from, or that a given shot is noised with, in the
            dtype and on the device in which the model is called.
        guidance: Guidance on the texts (default: none).
        t_c: Noise level of shots as conditions and history, 0-1000, for all or by index (paper, 4.2: 100-500; 100 where
            none is named). Low keeps more of them, high accumulates fewer errors.
        seed: Of the noise that a generated shot gets as history: another than the one that it started from, which it
            still tells of (ours; the paper leaves it open).
        steps: Euler steps of every take (paper, A.2: 32), or their noise levels, as :func:`euler` takes them; or a
            flow-matching scheduler of diffusers, after its ``set_timesteps``.
        write: How a generated shot's keys and values come about: ``"pass"``, in a pass of its own at exactly t_c
            (paper, 4.2); ``"nearest"``, as the step of its own take whose level is nearest to t_c wrote them, which
            spares the pass (ours). The latter where one shot was made alone, through the cache, and what is kept is
            the take shot last; all others are written in a pass.
        window: Most shots in a take and its history, where the take does not say (paper, 4: nine). Caches are made with
            room for as many; a longer history makes room when it comes.
        new_cache: Makes an empty cache, as ``new_cache(capacity=tokens, branch=name)`` (default: a :class:`KVCache`, or
            one for each expert).

    Raises:
        ValueError: for what is no scene to generate, a level outside 0-1000, a window without a shot, an unknown way to
            write, and one history for both branches, or keys of a single step, where the model does not allow it.
    """

    def __init__(
        self,
        model: SceneModel | Experts,
        scene: Sequence[ShotInput],
        *,
        guidance: Guidance | None = None,
        t_c: Levels = 100.0,
        seed: int = 0,
        steps: Steps = 32,
        write: Write = "pass",
        window: int = 9,
        new_cache: Callable[..., Any] | None = None,
    ) -> None:
        check_levels(t_c)
        check_scene(scene)
        self.model, self.guidance, self.t_c, self.seed, self.steps = model, guidance, t_c, seed, steps
        self.write: Write = check_write(write, model, guidance)
        self.window = recent(window).window
        self.scene: list[ShotInput] = with_dummy_video(scene, model.adapter)
        self._new_cache = new_cache
        self._caches: list[Any] | None = None
        self._kept: dict[int, Kept] = {}
        self._stale: frozenset[int] = frozenset()
        self._held: _Held | None = None
        self._texts(range(len(self.scene)))  # refuses negative prompts that do not fit

    @property
    def done(self) -> dict[int, Latents]:
        """Clean latents of the shots that are kept or given, by index, in float32 at least; the given as they came."""
        return {i: kept.latents for i, kept in self._kept.items()}

    @property
    def history(self) -> dict[int, tuple[int, ...]]:
        """What every done shot was made from, and its keys are written behind, by index.

        A shot that was made with others stands behind those of them that come before it.
        """
        return {i: kept.history for i, kept in self._kept.items()}

    @property
    def stale(self) -> tuple[int, ...]:
        """Shots that depended on what was replaced since, directly or through others: no history until kept again."""
        return tuple(sorted(self._stale))

    @property
    def caches(self) -> list[Any]:
        """The keys and values of history, by shots' indices: a cache for each branch of guidance, or one for both.

        One for both has the global prompt of each branch b, as ``("global", b)``.
        """
        if self._caches is None:
            make = self._new_cache or partial(new_cache, self.model)
            names = ["shared"] if self._shared else ["positive", "negative"]
            texts = self._texts(range(len(self.scene)))
            self._caches = [
                make(capacity=self._room(row), branch=name) for name, row in zip(names, texts, strict=False)
            ]
        return self._caches

    def seen(self, take: Take) -> tuple[int, ...]:
        """The history of a take: its own, or the last done shots before it that fit the window with it.

        Raises:
            ValueError: for a take of shots that the scene does not have, and a history of shots that are not done, are
                stale, or depend on a shot that the take makes.
        """
        shots = [i for i, shot in enumerate(self.scene) if shot.role != "global"]
        if unknown := [i for i in take.shots if i not in shots]:
            raise ValueError(f"shots: got {unknown}, expected some of {shots}, the scene's shots counting from 0")
        first, left = take.shots[0], max(0, self.window - len(take.shots))
        seen = choose(recent(left + 1), sorted(self._kept), first) if take.history is None else take.history
        if missing := [i for i in seen if i not in self._kept]:
            raise ValueError(
                f"history: shots {missing} are not done, expected some of {sorted(self._kept)}; make them first, or "
                "give them (the global shot is always seen)"
            )
        if stale := [i for i in seen if i in self._stale]:
            raise ValueError(
                f"history: shots {stale} depended on what was replaced since; make them again, or keep them as they "
                f"are: director.keep({{{stale[0]}: director.done[{stale[0]}]}}, take)"
            )
        after = self._dependents(take.shots)
        if depending := [i for i in seen if i in after]:
            raise ValueError(
                f"history: shots {depending} depend on {list(take.shots)}, which the take makes; leave them out, or "
                f"let them stand by themselves: director.give({depending[0]}, director.done[{depending[0]}])"
            )
        if in_order(take.pattern) and not take.cached and seen and max(seen) > first:
            raise ValueError(
                f"history: shot {max(seen)} comes after shot {first}, which would not see it in context-causal "
                "attention; take a pattern that sees it, or the cache, where the history comes first"
            )
        return tuple(seen)

    @torch.no_grad()
    def shoot(self, take: Take, *, callback: Callback | None = None) -> dict[int, Latents]:
        """Generate the shots of a take. Nothing is kept of them; keys and values that they need are written.

        Args:
            take: What to make from what.
            callback: Called after every step.

        Returns:
            Clean latents by the shots' indices, in float32 at least.

        Raises:
            ValueError: as :meth:`seen` and :class:`SceneModel` do, and for fewer than one step.
        """
        seen, active = self.seen(take), take.shots
        row = active if take.cached else (*self._everywhere, *merge(seen, active))
        held = {} if take.cached else {i: self._condition(i) for i in seen}
        noisy = noisy_parts(self.model, self.scene, active)
        path = self.model.adapter.traits.path
        levels = call_levels(self.steps, path)
        self._let_go()
        if take.cached:
            self._write((*self._everywhere, *seen))
        holding = take.cached and len(active) == 1 and self.write == "nearest"
        last = nearest(levels, level_of(self.t_c, active[0]) / 1000) if holding else None
        calls = count()

        def velocity(latents: list[Latents], t: float) -> list[Latents]:
            change = self._predict(
                row,
                {**held, **dict(zip(active, latents, strict=True))},
                {**{i: self._kept[i].level / 1000 for i in held}, **dict.fromkeys(active, t)},
                active,
                pattern=take.pattern,
                behind=(*self._everywhere, *seen) if take.cached else None,
            )
            if next(calls) == last:
                self._held = _Held(last, replace(take, history=seen), {})
                for cache in self.caches:
                    cache.hold()
            return change

        made = denoise(
            velocity,
            [self.scene[i].latents for i in active],
            path=path,
            noisy=noisy,
            steps=self.steps,
            shots=active,
            seed=self.seed,
            callback=callback,
        )
        results = dict(zip(active, made, strict=True))
        if self._held is not None:
            self._held.results.update(results)
        return results

    def keep(self, results: Mapping[int, Latents], take: Take, *, t_c: float | None = None) -> None:
        """Take what was made into the scene: others can be made from it.

        Where it replaces a shot, the keys and values of that and of all that depended on it are dropped, and those that
        were made from it are :attr:`stale`; what did not depend on it keeps its keys to the last bit.

        A shot is kept with the prompt and noise that the scene has now; latents that are done already, kept once more,
        with those that they were made with.

        Args:
            results: What :meth:`shoot` returned for the take, or other latents of the same shots.
            take: What they were made from; with ``history=None``, what :meth:`seen` says now.
            t_c: Their level as history, 0-1000 (default: the director's).

        Raises:
            ValueError: for other shots than the take's, latents of another shape, a level outside 0-1000, and as
                :meth:`seen` does.
        """
        history = self.seen(take)
        if sorted(results) != list(take.shots):
            raise ValueError(f"results: got shots {sorted(results)}, expected those of the take, {list(take.shots)}")
        self._check(results, t_c)
        held = self._holds(results, replace(take, history=history), t_c)
        self._replaced(take.shots, held=held)
        for n, i in enumerate(take.shots):
            self._kept[i] = Kept(
                latents=results[i],
                shot=self._as_made(i, results[i]),
                level=level_of(self.t_c, i) if t_c is None else t_c,
                history=(*history, *take.shots[:n]),
                beside=frozenset(() if in_order(take.pattern) else take.shots) - {i},
                pattern=take.pattern,
                given=False,
            )
        if held:
            for cache in self.caches:
                cache.append(*take.shots)
            self._held = None

    def give(self, i: int, latents: Latents, *, history: Sequence[int] = (), t_c: float | None = None) -> None:
        """Put a clip or an image, latents of one frame, in the place of a shot. It is noised with the scene's noise.

        Args:
            i: The shot's index.
            latents: What it is, clean.
            history: Done shots behind which its keys and values are written (default: none, it stands by itself).
            t_c: Its level as a condition and as history, 0-1000 (default: the director's).

        Raises:
            ValueError: for a shot that the scene does not have, latents of another shape than its noise, a level
                outside 0-1000, and a history as :meth:`seen` refuses.
        """
        self._check({i: latents}, t_c)
        history = self.seen(Take((i,), tuple(history)))
        self._replaced([i])
        level = level_of(self.t_c, i) if t_c is None else t_c
        self._kept[i] = Kept(
            latents=latents,
            shot=self.scene[i],
            level=level,
            history=history,
            beside=frozenset(),
            pattern="context_causal",
            given=True,
        )

    def revise(self, i: int, shot: ShotInput) -> None:
        """Give a shot another prompt or noise, for the takes to come; the next index adds a shot.

        What is done of it stays, with the prompt that it was made with, until another take of it is kept. The global
        shot is seen by all: another one leaves every shot that was made stale.

        Raises:
            ValueError: for an index beyond the next, another role, or no noise.
        """
        if not 0 <= i <= len(self.scene):
            raise ValueError(f"i: got shot {i}, expected one of the {len(self.scene)} shots from 0, or the next")
        scene = [*self.scene[:i], shot, *self.scene[i + 1 :]]
        check_scene(scene)
        if i < len(self.scene) and shot.role != self.scene[i].role:
            raise ValueError(f"shot: got the role {shot.role!r}, expected {self.scene[i].role!r}, as before")
        branches([shot], self.guidance, self.model.adapter.traits)  # refuses negative prompts that do not fit
        if i in self._everywhere:
            self._replaced([i])
        if self._held is not None and i in self._held.take.shots:
            self._let_go()  # it was written with what the shot was
        self.scene = with_dummy_video(scene, self.model.adapter)

    def discard(self, i: int) -> None:
        """Take a done shot out of the scene; what was made from it is :attr:`stale`.

        Raises:
            ValueError: for a shot that is not done.
        """
        if i not in self._kept:
            raise ValueError(f"i: shot {i} is not done, expected one of {sorted(self._kept)}")
        self._replaced([i])
        del self._kept[i]

    def fork(self) -> "Director":
        """A director who goes on from here without changing this one's scene: the tensors are shared until written."""
        other = copy(self)
        other.scene, other._kept = [*self.scene], {**self._kept}
        other._caches = self._caches and [cache.fork() for cache in self._caches]
        other._held = None
        return other

    @property
    def _everywhere(self) -> tuple[int, ...]:
        """The global shot, where there is one."""
        return tuple(i for i, shot in enumerate(self.scene[:1]) if shot.role == "global")

    @property
    def _shared(self) -> bool:
        """Whether one history serves both branches."""
        return self.guidance is not None and self.guidance.shared_history

    def _room(self, row: Sequence[ShotInput]) -> int:
        """Tokens of the longest history that the window allows, and of what is made behind it."""
        adapter = self.model.adapter
        shots = [adapter.shot(shot) for shot in row if shot.latents is not None]
        return room(shots, self.window, text=adapter.traits.text == "joint")

    def _texts(self, row: Iterable[int]) -> list[list[ShotInput]]:
        return branches([self.scene[i] for i in row], self.guidance, self.model.adapter.traits)

    def _check(self, latents: Mapping[int, Latents], t_c: float | None) -> None:
        check_given(self.scene, latents)
        if t_c is not None:
            check_levels(t_c)

    def _condition(self, i: int) -> Latents:
        """A done shot at its level; one that was made, with other noise than it started from."""
        kept, noise = self._kept[i], self._kept[i].shot.latents
        if not kept.given:
            noise = history_noise(kept.shot, i, self.seed).to(noise.dtype)
        return as_condition(self.model, replace(kept.shot, latents=noise), kept.latents, kept.level)

    def _as_made(self, i: int, latents: Latents) -> ShotInput:
        """The prompt and noise that a shot was made with: latents that are done already were with those of then."""
        before = self._kept.get(i)
        return before.shot if before is not None and before.latents is latents else self.scene[i]

    def _holds(self, results: Mapping[int, Latents], take: Take, t_c: float | None) -> bool:
        """Whether the caches hold the keys of these results of this take, at the call nearest to their level."""
        if self._held is None or self._held.take != take:
            return False
        if any(self._held.results.get(i) is not latents for i, latents in results.items()):
            return False
        level = level_of(self.t_c, take.shots[0]) if t_c is None else t_c
        return self._held.call == nearest(call_levels(self.steps, self.model.adapter.traits.path), level / 1000)

    def _let_go(self) -> None:
        """Forget the keys of a take that was not kept."""
        if self._held is not None:
            for cache in self.caches:
                cache.select([entry.id for entry in cache.shots])
            self._held = None

    def _write(self, shots: Iterable[int]) -> None:
        """Write the keys and values of shots that have none yet, each behind its own history."""
        for i in shots:
            if all(self._id(i, branch) in cache.ids for branch, cache in self._by_branch()):
                continue
            self._forget([i])  # where it was written in one branch alone, by a call that failed in the other
            if i in self._everywhere:
                self._write_global(i)
                continue
            kept = self._kept[i]
            if outdated := [j for j in kept.history if j in self._stale or j not in self._kept]:
                raise ValueError(
                    f"history: shot {i} was made from shots {outdated}, which are no longer what they were; keep it "
                    "again with another history"
                )
            history = (*self._everywhere, *kept.history)
            self._write(history)
            self._predict(
                (i,),
                {i: self._condition(i)},
                {i: kept.level / 1000},
                (),
                pattern=kept.pattern,
                behind=history,
                text_free=self._shared,
            )
            for cache in self.caches:
                cache.append(i)

    def _write_global(self, i: int) -> None:
        """The global shot is clean, and comes first; of a history for both branches, it is the prompt of each."""
        for texts, (branch, cache) in zip(self._texts([i]), self._by_branch(), strict=True):
            cache.select([])
            predict(self.model, [texts], None, {}, [0.0], (), pattern="context_causal", caches=[cache])
            cache.append(self._id(i, branch))

    def _predict(
        self,
        row: Sequence[int],
        latents: Mapping[int, Latents],
        levels: Mapping[int, float],
        active: Sequence[int],
        *,
        pattern: str | Pattern,
        behind: Sequence[int] | None,
        text_free: bool = False,
    ) -> list[Latents]:
        """One pass over a row of shots in every branch, behind the cached history where there is one."""
        places = {i: place for place, i in enumerate(row)}
        # A shot that is done is what it was made from, whatever the scene says now.
        shots = [self._kept[i].shot if i in latents and i not in active else self.scene[i] for i in row]
        texts = branches(shots, self.guidance, self.model.adapter.traits)
        return predict(
            self.model,
            texts[:1] if text_free else texts,  # which all branches share
            self.guidance,
            {places[i]: z for i, z in latents.items()},
            [levels.get(i, 0.0) for i in row],
            [places[i] for i in active],
            pattern=pattern,
            caches=[None] * len(texts) if behind is None else self._behind(behind),
            text_free=text_free,
        )

    def _by_branch(self) -> list[tuple[int, Any]]:
        """Every branch and its cache, which may be that of both."""
        return [(branch, self.caches[0 if self._shared else branch]) for branch in range(len(self._texts([])))]

    def _behind(self, history: Sequence[int]) -> Iterator[Any]:
        """The cache of each branch, with this history selected just before it is used."""
        for branch, cache in self._by_branch():
            ids = [self._id(i, branch) for i in history]
            if [entry.id for entry in cache.shots] != ids:
                cache.select(ids)
            yield cache

    def _id(self, i: int, branch: int) -> Hashable:
        """The name of a shot in a branch's cache."""
        return ("global", branch) if self._shared and i in self._everywhere else i

    def _dependents(self, shots: Iterable[int]) -> set[int]:
        return dependents(self._kept, shots, seen_by_all=self._everywhere)

    def _replaced(self, shots: Sequence[int], *, held: bool = False) -> None:
        """Drop the keys of shots and of all that depended on them, which are stale now; a given one is what it was."""
        if not held:
            self._let_go()
        after = self._dependents(shots)
        self._stale = (self._stale | {i for i in after if not self._kept[i].given}) - set(shots)
        self._forget([*shots, *after])

    def _forget(self, shots: Iterable[int]) -> None:
        """Drop the keys of shots; what is left of a selected history closes up."""
        names = {self._id(i, branch) for i in shots for branch in range(2)}
        for cache in self._caches or ():
            if any(entry.id in names for entry in cache.shots):
                cache.select([entry.id for entry in cache.shots if entry.id not in names])
            if written := [i for i in cache.ids if i in names]:
                cache.drop(*written)
