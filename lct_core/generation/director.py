"""A scene in the making: takes of it are shot, looked at, and kept or not (paper, 3.3, 3.4 and 4.3)."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from heapq import merge
from itertools import count
from typing import Any, Unpack

import torch

from lct_core import lineage
from lct_core.backbone import ShotInput
from lct_core.denoiser import Denoiser
from lct_core.engine.scene import with_dummy_video
from lct_core.generation.branch_caches import BranchCaches, HeldTake
from lct_core.generation.common import check_given, check_levels, check_scene, history_condition, level_of, noisy_parts
from lct_core.generation.euler import Callback, Latents
from lct_core.generation.history import last_before
from lct_core.generation.sampling import Sampling, SamplingOptions
from lct_core.generation.schedulers import call_levels, denoise
from lct_core.generation.takes import DoneShot, Take, in_order, shots_of
from lct_core.generation.write import check_write, nearest


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
        sampling: How it generates (default: ``Sampling()``).
        seed: Of the noise that a generated shot gets as history: an independent draw; the sample still correlates with
            its initial noise (ours; the paper leaves it open).
        new_cache: Makes an empty cache, as ``new_cache(capacity=tokens, branch=name)``, in place of the sampling's
            ``storage`` and ``budget`` (default: a :class:`KVCache`, or one for each expert, with these).
        options: Fields of the sampling.

    Raises:
        ValueError: for what is no scene to generate, as :class:`Sampling` does, for fewer than one step, and for one
            history for both branches, or keys of a single step, where the model does not allow it.
    """

    def __init__(
        self,
        model: Denoiser,
        scene: Sequence[ShotInput],
        *,
        sampling: Sampling | None = None,
        seed: int = 0,
        new_cache: Callable[..., Any] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> None:
        self.model, self.seed, self.sampling = model, seed, Sampling.of(sampling, options)
        check_scene(scene)
        check_write(self.sampling.write, model, self.sampling.on_texts)
        self.scene: list[ShotInput] = with_dummy_video(scene, model.adapter)
        self._steps = self.sampling.schedule
        self._done: dict[int, DoneShot] = {}
        self._stale: frozenset[int] = frozenset()
        self._branches = BranchCaches(model, self.sampling, new_cache, self._everywhere)
        self._branches.texts(self.scene)  # refuses negative prompts that do not fit

    @property
    def done(self) -> dict[int, Latents]:
        """Clean latents of the shots that are kept or given, by index, in float32 at least; the given as they came."""
        return {i: done.latents for i, done in self._done.items()}

    @property
    def history(self) -> dict[int, tuple[int, ...]]:
        """The shots visible when every done shot's keys and values are written, by index.

        To one that was made with others, those of them that come before it.
        """
        return {i: done.history for i, done in self._done.items()}

    @property
    def stale(self) -> tuple[int, ...]:
        """Shots that depended on what was replaced since, directly or through others: no history until kept again."""
        return tuple(sorted(self._stale))

    @property
    def caches(self) -> list[Any]:
        """The keys and values of history, by shots' indices: a cache for each branch of guidance, or one for both.

        One for both has the global prompt of each branch b, as ``("global", b)``.
        """
        return self._branches.made(self.scene)

    def seen(self, take: Take) -> tuple[int, ...]:
        """The history of a take: its own, or the last done shots before it that fit the window with it.

        Raises:
            ValueError: for a take of shots that the scene does not have, and a history of shots that are not done, are
                stale, or depend on a shot that the take makes.
        """
        shots = shots_of(self.scene)
        if unknown := [i for i in take.shots if i not in shots]:
            raise ValueError(f"shots: got {unknown}, expected some of {shots}, the scene's shots counting from 0")
        seen = take.history
        if seen is None:
            seen = last_before(take.shots, self._done, window=self.sampling.window)
        if missing := [i for i in seen if i not in self._done]:
            raise ValueError(
                f"history: shots {missing} are not done, expected some of {sorted(self._done)}; make them first, or "
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
        if in_order(take.pattern) and not take.cached and max(seen, default=-1) > take.shots[0]:
            raise ValueError(
                f"history: shot {max(seen)} comes after shot {take.shots[0]}, which would not see it in context-causal "
                "attention; take a pattern that sees it, or the cache, where the history comes first"
            )
        return seen

    @torch.no_grad()
    def shoot(self, take: Take, *, callback: Callback | None = None) -> dict[int, Latents]:
        """Generate the shots of a take. Nothing is kept of them; keys and values that they need are written.

        Args:
            take: What to make from what.
            callback: Called after every step.

        Returns:
            Clean latents by the shots' indices, in float32 at least.

        Raises:
            ValueError: as :meth:`seen` and :class:`SceneModel` do.
        """
        seen, active = self.seen(take), take.shots
        behind = (*self._everywhere, *seen) if take.cached else None
        row = active if take.cached else (*self._everywhere, *merge(seen, active))
        conditions = (
            {} if take.cached else {i: history_condition(self.model, i, self._done[i], self.seed) for i in seen}
        )
        noisy = noisy_parts(self.model, self.scene, active)
        path = self.model.adapter.traits.path
        levels = call_levels(self._steps, path)
        self._branches.let_go()
        if behind is not None:
            self._branches.write(behind, self.scene, self._done, stale=self._stale, seed=self.seed)
        holding = take.cached and len(active) == 1 and self.sampling.write == "nearest"
        last = nearest(levels, self._level(active[0]) / 1000) if holding else None
        calls = count()

        def velocity(latents: list[Latents], t: float) -> list[Latents]:
            # A shot that is done is what it was made from, whatever the scene says now.
            change = self._branches.predict(
                {i: self._done[i].shot if i in conditions else self.scene[i] for i in row},
                {**conditions, **dict(zip(active, latents, strict=True))},
                {**{i: self._done[i].level / 1000 for i in conditions}, **dict.fromkeys(active, t)},
                active,
                pattern=take.pattern,
                behind=behind,
            )
            if next(calls) == last:
                self._branches.hold(HeldTake(last, replace(take, history=seen), {}))
            return change

        made = denoise(
            velocity,
            [self.scene[i].latents for i in active],
            path=path,
            noisy=noisy,
            steps=self._steps,
            shots=active,
            seed=self.seed,
            callback=callback,
        )
        results = dict(zip(active, made, strict=True))
        if self._branches.held is not None:
            self._branches.held.results.update(results)
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
        has_keys = self._holds(results, replace(take, history=history), self._level(take.shots[0], t_c))
        self._replaced(take.shots, has_keys=has_keys)
        for i in take.shots:
            self._done[i] = DoneShot(
                latents=results[i],
                shot=self._as_made(i, results[i]),
                level=self._level(i, t_c),
                history=lineage.behind(history, take.shots, i),
                beside=lineage.beside(take.shots, i, in_order=in_order(take.pattern)),
                pattern=take.pattern,
                given=False,
            )
        if has_keys:
            self._branches.append(*take.shots)
            self._branches.held = None

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
        self._done[i] = DoneShot(
            latents=latents,
            shot=self.scene[i],
            level=self._level(i, t_c),
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
        self._branches.texts([shot])  # refuses negative prompts that do not fit
        if i in self._everywhere:
            self._replaced([i])
        if self._branches.held is not None and i in self._branches.held.take.shots:
            self._branches.let_go()  # it was written with what the shot was
        self.scene = with_dummy_video(scene, self.model.adapter)

    def discard(self, i: int) -> None:
        """Take a done shot out of the scene; what was made from it is :attr:`stale`.

        Raises:
            ValueError: for a shot that is not done.
        """
        if i not in self._done:
            raise ValueError(f"i: shot {i} is not done, expected one of {sorted(self._done)}")
        self._replaced([i])
        del self._done[i]

    def fork(self) -> "Director":
        """A director who goes on from here without changing this one's scene: the tensors are shared until written."""
        other = copy(self)
        other.scene, other._done, other._branches = [*self.scene], {**self._done}, self._branches.fork()
        return other

    @property
    def _everywhere(self) -> tuple[int, ...]:
        """The global shot, where there is one."""
        return tuple(i for i, shot in enumerate(self.scene[:1]) if shot.role == "global")

    def _check(self, latents: Mapping[int, Latents], t_c: float | None) -> None:
        check_given(self.scene, latents)
        if t_c is not None:
            check_levels(t_c)

    def _level(self, i: int, t_c: float | None = None) -> float:
        """A shot's level as history, 0-1000."""
        return level_of(self.sampling.t_c, i) if t_c is None else t_c

    def _as_made(self, i: int, latents: Latents) -> ShotInput:
        """The prompt and noise that a shot was made with: latents that are done already were with those of then."""
        before = self._done.get(i)
        return before.shot if before is not None and before.latents is latents else self.scene[i]

    def _holds(self, results: Mapping[int, Latents], take: Take, level: float) -> bool:
        """Whether the caches hold the keys of these results of this take, at the call nearest to their level."""
        held = self._branches.held
        if held is None or held.take != take or any(held.results.get(i) is not z for i, z in results.items()):
            return False
        return held.step == nearest(call_levels(self._steps, self.model.adapter.traits.path), level / 1000)

    def _dependents(self, shots: Sequence[int]) -> set[int]:
        """Done shots that saw one of these, directly or through others."""
        saw = {i: {*self._everywhere, *done.history, *done.beside} for i, done in self._done.items()}
        return lineage.dependents(saw, shots)

    def _replaced(self, shots: Sequence[int], *, has_keys: bool = False) -> None:
        """Drop the keys of shots and of all that depended on them, which are stale now; a given one is what it was."""
        if not has_keys:
            self._branches.let_go()
        after = self._dependents(shots)
        self._stale = (self._stale | {i for i in after if not self._done[i].given}) - set(shots)
        self._branches.forget([*shots, *after])
