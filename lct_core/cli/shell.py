"""The prompt of ``lct direct``: a command a line, each done before the next is read."""

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import click
import torch

from lct_core.checkpoints.factory import own_code
from lct_core.cli.options import within_memory
from lct_core.generation.euler import Callback
from lct_core.session import Session, SessionTake
from lct_core.session.book import listed

if TYPE_CHECKING:  # rich comes with the first thing to print
    from rich.console import Console

LESS_MEMORY = (
    "choose a shorter history, less of it --on-device, or begin a session with a smaller --size, with --bf16 or with "
    "--storage int8"
)

# What may follow generate: a value, if it takes one, and what it means.
_WORDS = {
    "from": ("1 3 | none | recent", "what it sees: shots in this order, none, or the last that fit the window"),
    "prompt": ('"..."', "what is to be seen, in place of what the script says"),
    "seed": ("7", "of the noise"),
    "t_c": ("300", "noise level, 0 to 1000, at which later shots see it"),
    "continues": ("", "goes on from the shot before, without a cut"),
    "cut": ("", "begins with a cut, where the script has none"),
    "recompute": ("", "runs what it sees again in every step, in place of the KV cache"),
}


class _Wish(NamedTuple):
    """What ``generate`` is asked for: the shots, and arguments of :meth:`Session.generate`."""

    shots: tuple[int, ...]
    arguments: dict[str, Any]


class Shell:
    """Reads commands until there are no more.

    Args:
        session: What they are done to.
        console: Where is said what was done.
        device: Where the model runs.
        factory: Whose code it is, see :func:`own_code`.
    """

    def __init__(self, session: Session, console: "Console", *, device: torch.device, factory: str | None) -> None:
        self._session, self._console, self._device, self._factory = session, console, device, factory
        self._commands: dict[str, tuple[str, Callable[[list[str]], None]]] = {
            "generate": (
                "[N ...]: a take of the first shot that is not kept; or of these, together",
                self._generate,
            ),
            "keep": ("[N ...]: the present take, into the scene; or stale shots, as they are", self._keep),
            "redo": ("[seed 7]: another take of the same with other noise: the next draw of the seed", self._redo),
            "history": ("1 3 | none | recent: what takes see until one is kept", self._history),
            "look": ("where the present take is to be seen", self._look),
            "give": ('2 hero.png [prompt "..."] [t_c 300]: keep a clip or an image as a shot', self._give),
            "undo": ("the last generate, redo, keep, give or history of this branch", self._undo),
            "branch": ("NAME: try another way from here", self._branch),
            "switch": ("NAME: go on with another branch", self._switch),
            "shots": ("where every shot stands", self._shots),
            "scene": ("[FOLDER]: write what is kept as a scene", self._scene),
            "save": ("write the KV cache too, so that going on later need not make it again", self._save),
            "help": ("these lines", self._help),
            "quit": ("save, and leave", self._quit),
        }
        self._going = True

    def run(self) -> None:
        """Read and do commands until ``quit``, or the end of what there is to read; then save."""
        self._say(f"{self._session.folder}: {_standing(self._session)}. help lists the commands.")
        for line in self._lines():
            self._do(line)
            if not self._going:
                break
        self._save([])

    def _lines(self) -> Iterator[str]:
        terminal = sys.stdin.isatty()
        while True:
            prompt = self._prompt()
            try:
                line = input(prompt) if terminal else sys.stdin.readline()
            except EOFError:
                self._say("")
                return
            except KeyboardInterrupt:
                if not terminal:
                    raise
                self._say("")
                continue
            if not terminal:
                if not line:
                    return
                if line.strip():
                    self._say(prompt + line.strip())  # so that what is written tells the whole story
            yield line

    def _prompt(self) -> str:
        """The branch, and the shot that comes next."""
        session = self._session
        stands = f"shot {session.next}" if session.next <= len(session.shots) else "every shot kept"
        return f"{session.branch_name}, {stands}> "

    def _do(self, line: str) -> None:
        """Do one command; what is wrong with it is one line, and the session goes on."""
        try:
            words = shlex.split(line, comments=True)
            if words:
                with own_code(self._factory), within_memory(self._device, fix=LESS_MEMORY):
                    self._find(words[0])(words[1:])
        except KeyboardInterrupt:
            self._say("interrupted: a take in progress is given up; all before it stands")
        except (ValueError, OSError, ImportError) as error:
            click.echo(f"error: {' '.join(str(error).split())}", err=True)

    def _find(self, name: str) -> Callable[[list[str]], None]:
        """The command of a name, or of the beginning of one."""
        found = [name] if name in self._commands else [known for known in self._commands if known.startswith(name)]
        if len(found) != 1:
            what = f"which of {', '.join(found)}?" if found else f"expected one of {', '.join(self._commands)}"
            raise ValueError(f"{name!r}: {what}")
        return self._commands[found[0]][1]

    def _generate(self, words: list[str]) -> None:
        wish = _wish(words)
        with self._making(f"steps of {listed(wish.shots or (self._session.next,))}") as callback:
            take = self._session.generate(*wish.shots, **wish.arguments, callback=callback)
        self._made(take)

    def _redo(self, words: list[str]) -> None:
        wish = _wish(words, ("seed",))
        with self._making("steps of another take") as callback:
            take = self._session.redo(**wish.arguments, callback=callback)
        self._made(take)

    @contextmanager
    def _making(self, name: str) -> Iterator[Callback]:
        """Progress of a take."""
        from lct_core.progress import Stages

        with Stages(self._console) as progress, progress(name, self._session.settings.steps) as advance:
            yield lambda _: advance()

    def _made(self, take: SessionTake) -> None:
        self._say(take.told)
        self._look([])
        self._stale()

    def _keep(self, words: list[str]) -> None:
        shots = _numbers(words)
        self._session.keep(*shots)
        present, kept = self._session.present, self._session.kept
        of_take = present.shots if present and not shots else ()
        self._say("kept: " + ", ".join(f"take {kept[n]} of shot {n}" for n in shots or of_take))
        self._stale()

    def _history(self, words: list[str]) -> None:
        if not words:
            raise ValueError("history: expected shots, such as 1 3; none; or recent, the last that fit the window")
        chosen = _history(words)
        self._session.history(None if chosen == "recent" else chosen)
        self._say(f"the next takes see {self._chosen()}")

    def _chosen(self) -> str:
        """What takes see, in words."""
        chosen = self._session.chosen
        return "the last shots that fit the window" if chosen is None else listed(chosen)

    def _look(self, words: list[str]) -> None:
        _nothing(words)
        self._say("\n".join(f"  {path}" for path in self._session.look()))

    def _give(self, words: list[str]) -> None:
        if len(words) < 2 or not words[0].isdecimal():
            raise ValueError("give: expected a shot and a file, such as 2 hero.png")
        wish = _wish(words[2:], ("prompt", "t_c"))
        take = self._session.give(int(words[0]), words[1], **wish.arguments)
        self._made(take)
        self._say(f"kept: take {take.number} of shot {words[0]}")

    def _undo(self, words: list[str]) -> None:
        _nothing(words)
        self._session.undo()
        self._standing()

    def _branch(self, words: list[str]) -> None:
        self._session.branch(_name(words))
        self._standing()

    def _switch(self, words: list[str]) -> None:
        self._session.switch(_name(words))
        self._standing()

    def _shots(self, words: list[str]) -> None:
        from rich import box
        from rich.table import Table

        _nothing(words)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("shot", justify="right", no_wrap=True)
        for name in ("state", "take", "sees", "t_c"):
            table.add_column(name, no_wrap=True)
        table.add_column("what is to be seen")
        for row in self._session.shots:
            take, level = "" if row.take is None else str(row.take), "" if row.t_c is None else f"{row.t_c:g}"
            cells = [str(row.shot), row.state, take, ", ".join(map(str, row.history)), level]
            table.add_row(*cells, row.text)
        self._console.print(table)
        self._stale()

    def _scene(self, words: list[str]) -> None:
        if len(words) > 1:
            raise ValueError("scene: expected a folder, or nothing")
        self._say("\n".join(f"  {path}" for path in self._session.scene(*words)))

    def _save(self, words: list[str]) -> None:
        _nothing(words)
        folder = self._session.save()
        self._say(f"saved: {folder}" if folder else "saved: nothing is new")

    def _help(self, words: list[str]) -> None:
        _nothing(words)
        for name, (what, _) in self._commands.items():
            self._say(f"  {name:<8} {what}")
            for word, (value, meaning) in _WORDS.items() if name == "generate" else ():
                self._say(f"           {f'{word} {value}'.strip()}: {meaning}")
        self._say("A command may be cut short, as long as it is the only one that begins so.")

    def _quit(self, words: list[str]) -> None:
        _nothing(words)
        self._going = False

    def _stale(self) -> None:
        """Say which shots are stale, and what to do about them."""
        if stale := self._session.stale:
            numbers = " ".join(map(str, stale))
            self._say(
                f"stale: {listed(stale)}, made from what was replaced since; not seen by others until generated again, "
                f"or kept as is (keep {numbers})"
            )

    def _standing(self) -> None:
        """Say where the session stands."""
        self._say(_standing(self._session))
        self._stale()

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)


def _standing(session: Session) -> str:
    take, kept = session.present, session.kept
    last = "no take yet"
    if take is not None:
        whether = "kept" if all(kept.get(n) == take.number for n in take.shots) else "not kept"
        last = f"the present one is take {take.number}, of {listed(take.shots)}, {whether}"
    return f"branch {session.branch_name}, {len(kept)} of {len(session.shots)} shots kept; {last}"


def _wish(words: Sequence[str], known: Sequence[str] = (*_WORDS,)) -> _Wish:
    """What stands after a command: shots, then words with their values."""
    left, arguments = list(words), dict[str, Any]()
    shots = _leading(left) if "from" in known else ()
    while left:
        given = left.pop(0)
        word = given.replace("-", "_")
        if word not in known:
            raise ValueError(
                f"got {given!r}, expected {'shots, or ' if 'from' in known else ''}one of {', '.join(known)}"
            )
        if word == "from":
            several = [left.pop(0)] if left and left[0] in ("none", "recent") else [str(n) for n in _leading(left)]
            arguments["history"] = _history(several)
        elif word in ("continues", "cut"):
            arguments["continues"] = word == "continues"
        elif word == "recompute":
            arguments["cached"] = False
        elif not left:
            raise ValueError(f"{word}: expected a value after it")
        elif word == "prompt":
            arguments["prompt"] = left.pop(0)
        else:
            arguments[word] = _number(word, left.pop(0), int if word == "seed" else float)
    return _Wish(shots, arguments)


def _leading(words: list[str]) -> tuple[int, ...]:
    """The numbers that words begin with, taken off."""
    numbers = []
    while words and words[0].isdecimal():
        numbers.append(int(words.pop(0)))
    return tuple(numbers)


def _numbers(words: list[str]) -> tuple[int, ...]:
    left = list(words)
    numbers = _leading(left)
    if left:
        raise ValueError(f"got {left[0]!r}, expected numbers of shots")
    return numbers


def _history(words: list[str]) -> tuple[int, ...] | Literal["recent"]:
    if words in (["none"], ["recent"]):
        return () if words == ["none"] else "recent"
    if not words:
        raise ValueError("from: expected shots after it, such as 1 3; none; or recent, the last that fit the window")
    return _numbers(words)


def _number(name: str, word: str, kind: type) -> Any:
    try:
        return kind(word)
    except ValueError:
        raise ValueError(f"{name}: got {word!r}, expected a {'whole ' * (kind is int)}number") from None


def _name(words: list[str]) -> str:
    if len(words) != 1:
        raise ValueError("expected one name after the command, such as close-up")
    return words[0]


def _nothing(words: list[str]) -> None:
    if words:
        raise ValueError(f"got {words[0]!r} after the command, expected nothing")
