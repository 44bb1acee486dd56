"""Progress on the console: bars with the time left on a terminal, else a line now and then."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from time import perf_counter
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Stages:
    """Progress, stage by stage.

    Args:
        console: Where it goes.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description:<36}", markup=False),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    @contextmanager
    def __call__(self, name: str, steps: int = 1) -> Iterator[Callable[..., None]]:
        """A stage that ends with the ``with``; what it yields is called after every step, see :meth:`open`."""
        advance = self.open(name, steps)
        yield advance
        advance(completed=steps)

    def say(self, line: str) -> None:
        """Print a line above the bars, as it is."""
        self._console.print(line, soft_wrap=True, markup=False)

    def named(self, steps: Mapping[str, int], *, prefix: str = "") -> Callable[[str], Callable[..., None]]:
        """Stages that begin when they are first asked for.

        Args:
            steps: Of every stage, by its name.
            prefix: What the console puts before the name.

        Returns:
            What :meth:`open` returns, by the stage's name.
        """

        @cache
        def stage(name: str) -> Callable[..., None]:
            return self.open(f"{prefix}{name}", steps[name])

        return stage

    def open(self, name: str, steps: int) -> Callable[..., None]:
        """A stage that begins now.

        Returns:
            A function to be called after every step, with the loss where there is one, and with the number of steps
            ``completed`` where it is not one more than before.
        """
        task = self._progress.add_task(name, total=steps, note="")
        started, done = perf_counter(), 0

        def advance(loss: float | None = None, *, completed: int | None = None) -> None:
            nonlocal done
            before, done = done, done + 1 if completed is None else completed
            note = "" if loss is None else f"loss {loss:.4f}"
            self._progress.update(task, completed=done, note=note)
            quarter = steps >= 1000 and done * 4 // steps > before * 4 // steps
            if not self._console.is_terminal and done > before and (done == steps or quarter):
                line = f"{name}: {done} of {steps}, {perf_counter() - started:.0f} s"
                self.say(f"{line}, {note}" if note else line)

        return advance
