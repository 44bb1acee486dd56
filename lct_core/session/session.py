"""A session: what the director says, and what there is on disk of it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self, Unpack

import torch
from torch import Tensor

from lct_core.cache import Budget
from lct_core.codec import Codec
from lct_core.denoiser import Denoiser
from lct_core.fingerprint import check_fingerprint
from lct_core.generation import Sampling
from lct_core.generation.common import check_levels
from lct_core.generation.euler import Callback
from lct_core.generation.sampling import SamplingOptions
from lct_core.script import Script
from lct_core.session.archive import Archive, check_size
from lct_core.session.book import CACHE, FILE, SCENE, TAKES, Book, SessionTake, ShotRow, check_new, listed
from lct_core.session.export import export_scene
from lct_core.session.live import LiveDirector
from lct_core.session.settings import Settings


class Session:
    """A scene made shot by shot: generated, looked at, kept or done again, from a history that the director chooses.

    What was generated is on disk before :meth:`generate` returns; whatever happens to the process, at most the take in
    progress is lost, and going on from there gives the same bits (on a CPU) as if nothing had happened::

        session = Session.create("runs/cafe", model, codec, script, size=(25, 480, 832))
        session.generate()  # shot 1
        session.keep()
        session.generate(prompt="Close up of Character 1.")  # shot 2, with another prompt
        session.redo()  # the same with other noise
        session.keep()
        session.generate(3, history=[1])  # sees shot 1 alone
        Session.open("runs/cafe", model, codec)  # in another process

    Shots are called by their numbers in the script, from 1. :meth:`create` and :meth:`open` make one. In its folder,
    ``session.json`` says what there is; ``takes/0001`` has the latents of a take and, once it was looked at, its videos
    and contact sheet; ``cache`` has keys and values, if they were saved. Nothing is pickled, and a take that is not
    kept stays. Keys and values that were not saved are written again when they are needed, in one pass for a shot, and
    are the same: they are always written in a pass of their own.
    """

    def __init__(self, folder: Path, model: Denoiser, codec: Codec, book: Book, *, budget: Budget | None) -> None:
        self.folder, self.model, self.codec = folder, model, codec
        self._book = book
        self._archive = Archive(folder / TAKES, codec, book.settings)
        self._live = LiveDirector(model, codec, self._archive, folder / CACHE, budget)
        self._stamp: tuple[int, int] | None = None  # of the file as this session wrote or read it

    @classmethod
    def create(
        cls,
        folder: str | Path,
        model: Denoiser,
        codec: Codec,
        script: Script,
        *,
        size: tuple[int, int, int],
        seed: int = 0,
        pattern: str = "context_causal",
        fps: float = 12.0,
        reading: Mapping[str, Any] | None = None,
        about: Mapping[str, Any] | None = None,
        sampling: Sampling | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Self:
        """Begin a session in a new folder.

        Args:
            folder: Where it is kept.
            model: A scene model, or the experts that share out its levels, on its device.
            codec: Its codec.
            script: The global description, and the shots to begin with: more can be added.
            size: Frames, height and width in pixels of what is generated.
            seed: Of all noise.
            pattern: The attention that the model was tuned with.
            fps: Frames per second of the videos (paper, A.1: 12).
            reading: How given files are read: arguments of :func:`lct_core.data.read_video` (default: as they are).
            about: What else to keep with it, as JSON can say it, to be found again as :attr:`about`.
            sampling: How it generates, with guidance as a scale, None for none (default: a scale of 7.5, and else
                ``Sampling()``). Its budget is to be told again to :meth:`open`; files of it go to the session's own
                ``cache``, unless it names a folder.
            options: Fields of the sampling.

        Raises:
            FileExistsError: the folder holds a session, or something else where one keeps its own.
            ValueError: for a size that the codec or a video file can't take, and settings that generation refuses.
        """
        folder = Path(folder)
        check_new(folder)
        check_size(size, codec, name="size")
        sampling = Sampling.of(sampling or Sampling(guidance=7.5), options)
        settings = Settings(
            size=size, seed=seed, sampling=sampling, pattern=pattern, fps=fps, reading=dict(reading or {})
        )
        book = Book(script=script, settings=settings, model=model.fingerprint(), about=dict(about or {}))
        session = cls(folder, model, codec, book, budget=sampling.budget)
        list(session._live.follow(book).caches)  # refuses what generation does, while nothing is written
        folder.mkdir(parents=True, exist_ok=True)
        session._commit(book)
        return session

    @classmethod
    def open(
        cls,
        folder: str | Path,
        model: Denoiser,
        codec: Codec,
        *,
        budget: Budget | None = None,
    ) -> Self:
        """Go on with a session: it is as after the last call that returned.

        Args:
            folder: Where it is kept.
            model: The model that it was made with.
            codec: Its codec.
            budget: As :meth:`create` takes it.

        Raises:
            FileNotFoundError: there is no session in the folder.
            ValueError: its file is damaged, or it was made with another model.
        """
        folder = Path(folder)
        book = Book.read(folder)
        try:
            check_fingerprint(book.model, model.fingerprint())
        except ValueError as error:
            raise ValueError(f"{folder}: made with another model: {error}") from error
        session = cls(folder, model, codec, book, budget=budget)
        session._stamp = session._on_disk()
        return session

    @property
    def settings(self) -> Settings:
        """What holds for all takes."""
        return self._book.settings

    @property
    def about(self) -> Mapping[str, Any]:
        """What was to be kept with it."""
        return self._book.about

    @property
    def present(self) -> SessionTake | None:
        """The take to be looked at, kept or done again."""
        return self._book.present

    @property
    def chosen(self) -> tuple[int, ...] | None:
        """What :meth:`history` chose; None for the last shots that fit the window."""
        return self._book.state.history

    @property
    def branch_name(self) -> str:
        """The present branch."""
        return self._book.branch

    @property
    def branches(self) -> tuple[str, ...]:
        """All branches."""
        return tuple(self._book.branches)

    @property
    def next(self) -> int:
        """The first shot that is not kept."""
        return self._book.next

    @property
    def kept(self) -> dict[int, int]:
        """The number of the take that is kept of every shot, by shot."""
        return dict(sorted(self._book.state.kept.items()))

    @property
    def stale(self) -> tuple[int, ...]:
        """Kept shots that were made from one that was replaced since, directly or through others.

        They stay in the scene, but no shot can see them until they are generated, or kept, again.
        """
        return self._book.stale

    @property
    def latents(self) -> dict[int, Tensor]:
        """Clean latents of the shots that are kept, by number: ``[1, channels, frames, height, width]``, float32."""
        return {n: self._archive.latents(self._book.take(number), n) for n, number in self.kept.items()}

    @property
    def shots(self) -> list[ShotRow]:
        """Where every shot stands."""
        return self._book.rows

    def generate(
        self,
        *shots: int,
        history: Sequence[int] | Literal["recent"] | None = None,
        prompt: str | None = None,
        seed: int | None = None,
        t_c: float | None = None,
        cached: bool | None = None,
        continues: bool | None = None,
        callback: Callback | None = None,
    ) -> SessionTake:
        """Make a shot, or several together: the present take, to be looked at, and kept or not.

        The same arguments give the same take; :meth:`redo` draws other noise.

        Args:
            shots: Which (default: the first that is not kept). The one after the last adds a shot, with a ``prompt``.
            history: The kept, earlier shots that they see, in this order; "recent" for the last ones that fit the
                window, none of them stale (default: what :meth:`history` chose, or else these).
            prompt: What is to be seen, in place of the script's text.
            seed: Of the noise (default: the session's).
            t_c: Level, 0-1000, at which later shots are to see these (default: the session's).
            cached: Whether the history is seen through keys and values; else it runs again in every step (default: for
                a context-causal model).
            continues: Whether the shot goes on from the one before, without a cut (paper, 4.3; default: as the script
                says).
            callback: Called after every step.

        Raises:
            ValueError: for shots or a history that there are not, and as generation does.
            OSError: where the take can't be written. What was there before is whole.
        """
        chosen = tuple(sorted(set(shots or [self.next])))
        if prompt is not None and len(chosen) > 1:
            raise ValueError(f"prompt: got one for shots {list(chosen)}, expected a single shot; generate one by one")
        texts = [self._book.text(n, prompt, continues) for n in chosen]
        take = SessionTake(
            number=len(self._book.takes) + 1,
            shots=chosen,
            texts=tuple(text.text for text in texts),
            cuts=tuple(text.cut for text in texts),
            seen=self._book.seen(chosen, history),
            seed=self.settings.seed if seed is None else seed,
            draw=0,
            t_c=self.settings.t_c if t_c is None else t_c,
            cached=self.settings.pattern == "context_causal" if cached is None else cached,
        )
        return self._make(take, callback)

    def redo(self, *, seed: int | None = None, callback: Callback | None = None) -> SessionTake:
        """Make the present take again, with other noise.

        Args:
            seed: Of the noise (default: the take's own, but a draw that was not used).
            callback: Called after every step.

        Raises:
            ValueError: where there is no take, or the present one is a file; and as :meth:`generate` does.
        """
        take = self.present
        if take is None or take.file:
            got = "there is no take" if take is None else f"take {take.number} was given"
            raise ValueError(f"redo: {got}, expected one that was generated; generate a shot first")
        draws = [old.draw for old in self._book.takes if old.seed == take.seed and {*old.shots} & {*take.shots}]
        again = replace(
            take,
            number=len(self._book.takes) + 1,
            seen=self._book.seen(take.shots, take.history),
            seed=take.seed if seed is None else seed,
            draw=1 + max(draws) if seed is None else 0,
        )
        return self._make(again, callback)

    def keep(self, *stale: int) -> None:
        """Take the present take into the scene; or keep stale shots as they are.

        Later shots see a stale shot that is kept as it is with keys and values written behind the present versions of
        its history.

        Args:
            stale: Stale shots (default: none, the present take).

        Raises:
            ValueError: where there is no take, or it is kept already; for a shot that is not stale.
        """
        book, take = self._book, self.present
        if stale:
            self._check_unchanged()  # before files are written
            for n in sorted(set(stale)):
                book = self._kept_again(book, n)
            self._commit(replace(self._book, takes=book.takes).then(kept=book.state.kept))
            return
        if take is None or all(book.state.kept.get(n) == take.number for n in take.shots):
            got = "there is no take" if take is None else f"take {take.number} is kept already"
            raise ValueError(f"keep: {got}; generate a shot first")
        self._commit(book.then(kept={**book.state.kept, **dict.fromkeys(take.shots, take.number)}, history=None))

    def history(self, shots: Sequence[int] | None) -> None:
        """Choose what the next take sees, until one is kept.

        Args:
            shots: Kept shots, in the order in which they are seen; None for the last ones that fit the window.

        Raises:
            ValueError: for shots that are not kept, or stale.
        """
        self._book.check_history(shots or ())
        self._commit(self._book.then(history=None if shots is None else tuple(shots)))

    def undo(self) -> None:
        """Go back to before the last call that changed this branch. No file is removed.

        Raises:
            ValueError: where there is nothing left to undo.
        """
        book, states = self._book, self._book.branches[self._book.branch]
        if len(states) == 1:
            raise ValueError("undo: nothing is left to undo on this branch")
        self._commit(replace(book, branches={**book.branches, book.branch: states[:-1]}))

    def branch(self, name: str) -> None:
        """Begin another branch here, and go on with it.

        Args:
            name: What to call it.

        Raises:
            ValueError: for an empty name, or one that is taken.
        """
        book = self._book
        if not name or name in book.branches:
            raise ValueError(f"name: got {name!r}, expected one that is not taken: there is {', '.join(book.branches)}")
        states = book.branches[book.branch]
        self._commit(replace(book, branches={**book.branches, name: states}, branch=name))

    def switch(self, name: str) -> None:
        """Go on with another branch, where it was left.

        Args:
            name: The branch.

        Raises:
            ValueError: for one that there is not.
        """
        if name not in self._book.branches:
            raise ValueError(f"name: got {name!r}, expected one of {', '.join(self._book.branches)}")
        self._commit(replace(self._book, branch=name))

    def give(self, shot: int, file: str | Path, *, prompt: str | None = None, t_c: float | None = None) -> SessionTake:
        """Put a clip or an image in the place of a shot, and keep it. It sees no other shot.

        Args:
            shot: Which; the one after the last adds a shot, with a ``prompt``.
            file: A video or an image, of any size that the codec takes. It is copied.
            prompt: What is to be seen in it, in place of the script's text.
            t_c: Level, 0-1000, at which later shots are to see it (default: the session's).

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: for a file that can't be read, or is of a size that the codec or a video file can't take.
            OSError: where it can't be written.
        """
        file, text = Path(file), self._book.text(shot, prompt, None)
        level = self.settings.t_c if t_c is None else t_c
        check_levels(level)
        frames = self._archive.read(file)
        check_size((frames.shape[1], frames.shape[2], frames.shape[3]), self.codec, name=f"file: {file}")
        take = SessionTake(
            number=len(self._book.takes) + 1,
            shots=(shot,),
            texts=(text.text,),
            cuts=(text.cut,),
            seen={},
            seed=self.settings.seed,
            draw=0,
            t_c=level,
            cached=True,
            file=file.name,
        )
        with torch.no_grad():
            latents = self.codec.encode(frames)[None]
        self._check_unchanged()
        take = self._archive.give(take, file, latents)
        kept = {**self._book.state.kept, shot: take.number}
        self._commit(self._book.with_take(take, kept=kept, present=take.number))
        return take

    def look(self) -> list[Path]:
        """Where the present take is to be seen: its contact sheet, beside what it was made from, and its videos.

        They are made where they are missing.

        Raises:
            ImportError: PyAV is not installed.
            ValueError: where there is no take.
            OSError: where they can't be written.
        """
        take = self.present
        if take is None:
            raise ValueError("look: there is no take; generate a shot first")
        history = [self._book.take(number) for number in take.seen.values()]
        return [self._archive.sheet(take, history), *(self._archive.picture(take, n) for n in take.shots)]

    def scene(self, out: str | Path | None = None) -> list[Path]:
        """Write the kept shots as a scene folder, as ``lct generate`` does.

        Args:
            out: A folder without a scene (default: ``scene`` in the session's, in place of an older one).

        Returns:
            The folder, its contact sheet and, where all shots are of one size, the video of it all.

        Raises:
            FileExistsError: ``out`` holds a scene.
            ValueError: where nothing is kept, or a shot is missing before the last that is.
        """
        return export_scene(self._book, self._archive, self.folder / SCENE, None if out is None else Path(out))

    def save(self) -> Path | None:
        """Write the keys and values of this branch's history to disk too, so that :meth:`open` need not make them.

        Returns:
            Their folder; None where there are none in memory, and what is on disk is all.

        Raises:
            OSError: where they can't be written; nothing else is lost.
        """
        self._check_unchanged()
        return self.folder / CACHE if self._live.save(self._book) else None

    def _make(self, take: SessionTake, callback: Callback | None) -> SessionTake:
        self._check_unchanged()
        check_levels(take.t_c)
        latents = self._live.shoot(self._book, take, callback)
        self._check_unchanged()  # another session's take of this number is not to be overwritten
        take = self._archive.write(take, latents)
        self._commit(self._book.with_take(take, present=take.number))
        return take

    def _kept_again(self, book: Book, n: int) -> Book:
        """The book after a stale shot was kept as it is, behind the shots that it saw as they are now."""
        if n not in book.stale:
            expected = f"expected some of {list(book.stale)}" if book.stale else "and no other is"
            raise ValueError(f"stale: shot {n} is not stale, {expected}; without a shot, keep is for the present take")
        old = book.kept(n)
        seen = {i: book.state.kept[i] for i in old.behind(n)}
        if still := [i for i in seen if i in book.stale]:
            raise ValueError(f"stale: shot {n} was made from {listed(still)}, stale too; keep or generate those first")
        text = old.script_shot(n)
        take = replace(old, number=len(book.takes) + 1, shots=(n,), texts=(text.text,), cuts=(text.cut,), seen=seen)
        take = self._archive.write(take, {n: self._archive.latents(old, n)})
        return book.with_take(take, kept={**book.state.kept, n: take.number})

    def _commit(self, book: Book) -> None:
        self._check_unchanged()
        book.write(self.folder)
        self._book, self._stamp = book, self._on_disk()

    def _check_unchanged(self) -> None:
        if self._on_disk() != self._stamp:
            raise ValueError(
                f"{self.folder / FILE}: written by another session since this one was opened; close one of them, and "
                "open it again"
            )

    def _on_disk(self) -> tuple[int, int] | None:
        """What changes whenever the file is replaced."""
        try:
            about = (self.folder / FILE).stat()
        except FileNotFoundError:
            return None
        return about.st_ino, about.st_mtime_ns
