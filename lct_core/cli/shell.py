"""The prompt of ``lct direct``: a command a line, each done before the next is read."""

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
import torch
from rich.console import Console

from lct_core.cli.machine import within_memory
from lct_core.cli.shell_words import WORDS, read_history, read_name, read_nothing, read_shots, read_wish
from lct_core.cli.tables import table
from lct_core.cli.user_code import own_code
from lct_core.generation.euler import Callback
from lct_core.progress import Stages
from lct_core.session import Session, SessionTake
from lct_core.session.book import listed

LESS_MEMORY = (
    "choose a shorter history, less of it --on-device, or begin a session with a smaller --size, with --bf16 or with "
    "--storage int8"
)


class Shell:
    """Reads commands until there are no more.

    Args:
        session: What they are done to.
        console: Where is said what was done.
        device: Where the model runs.
        factory: Whose code it is, see :func:`own_code`.
    """

    def __init__(self, session: Session, console: Console, *, device: torch.device, factory: str | None) -> None:
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
        wish = read_wish(words)
        with self._making(f"steps of {listed(wish.shots or (self._session.next,))}") as callback:
            take = self._session.generate(*wish.shots, **wish.arguments, callback=callback)
        self._made(take)

    def _redo(self, words: list[str]) -> None:
        wish = read_wish(words, ("seed",))
        with self._making("steps of another take") as callback:
            take = self._session.redo(**wish.arguments, callback=callback)
        self._made(take)

    @contextmanager
    def _making(self, name: str) -> Iterator[Callback]:
        """Progress of a take."""
        with Stages(self._console) as progress, progress(name, self._session.settings.steps) as advance:
            yield lambda _: advance()

    def _made(self, take: SessionTake) -> None:
        self._say(take.told)
        self._look([])
        self._stale()

    def _keep(self, words: list[str]) -> None:
        shots = read_shots(words)
        self._session.keep(*shots)
        present, kept = self._session.present, self._session.kept
        of_take = present.shots if present and not shots else ()
        self._say("kept: " + ", ".join(f"take {kept[n]} of shot {n}" for n in shots or of_take))
        self._stale()

    def _history(self, words: list[str]) -> None:
        if not words:
            raise ValueError("history: expected shots, such as 1 3; none; or recent, the last that fit the window")
        chosen = read_history(words)
        self._session.history(None if chosen == "recent" else chosen)
        seen = self._session.chosen
        self._say(f"the next takes see {'the last shots that fit the window' if seen is None else listed(seen)}")

    def _look(self, words: list[str]) -> None:
        read_nothing(words)
        self._say("\n".join(f"  {path}" for path in self._session.look()))

    def _give(self, words: list[str]) -> None:
        if len(words) < 2 or not words[0].isdecimal():
            raise ValueError("give: expected a shot and a file, such as 2 hero.png")
        wish = read_wish(words[2:], ("prompt", "t_c"))
        take = self._session.give(int(words[0]), words[1], **wish.arguments)
        self._made(take)
        self._say(f"kept: take {take.number} of shot {words[0]}")

    def _undo(self, words: list[str]) -> None:
        read_nothing(words)
        self._session.undo()
        self._standing()

    def _branch(self, words: list[str]) -> None:
        self._session.branch(read_name(words))
        self._standing()

    def _switch(self, words: list[str]) -> None:
        self._session.switch(read_name(words))
        self._standing()

    def _shots(self, words: list[str]) -> None:
        read_nothing(words)
        made = table("shot", "state", "take", "sees", "t_c", wrap=False, gap=2)
        made.columns[0].justify = "right"
        made.add_column("what is to be seen")
        for row in self._session.shots:
            take, level = "" if row.take is None else str(row.take), "" if row.t_c is None else f"{row.t_c:g}"
            made.add_row(str(row.shot), row.state, take, ", ".join(map(str, row.history)), level, row.text)
        self._console.print(made)
        self._stale()

    def _scene(self, words: list[str]) -> None:
        if len(words) > 1:
            raise ValueError("scene: expected a folder, or nothing")
        self._say("\n".join(f"  {path}" for path in self._session.scene(*words)))

    def _save(self, words: list[str]) -> None:
        read_nothing(words)
        folder = self._session.save()
        self._say(f"saved: {folder}" if folder else "saved: nothing is new")

    def _help(self, words: list[str]) -> None:
        read_nothing(words)
        for name, (what, _) in self._commands.items():
            self._say(f"  {name:<8} {what}")
            for word, (value, meaning) in WORDS.items() if name == "generate" else ():
                self._say(f"           {f'{word} {value}'.strip()}: {meaning}")
        self._say("A command may be cut short, as long as it is the only one that begins so.")

    def _quit(self, words: list[str]) -> None:
        read_nothing(words)
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
