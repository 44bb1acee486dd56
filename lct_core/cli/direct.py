"""``lct direct``: a scene made shot by shot, by what a director types."""

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import torch
from click.core import ParameterSource

from lct_core.cli.factory import current_folder_on_path, own_code
from lct_core.cli.options import COUNT, FINITE, FPS, LEVEL, POSITIVE, device, seed, seeded, within_memory
from lct_core.cli.tuned import Tuned, parse_size
from lct_core.generation.euler import Callback
from lct_core.script import read_script
from lct_core.session import Book, Session, SessionTake
from lct_core.session.book import listed

if TYPE_CHECKING:  # rich comes with the first thing to print
    from rich.console import Console

_LESS_MEMORY = "choose a shorter history, or begin a session with a smaller --size, or with --bf16"
_WORDS = ("from", "prompt", "seed", "t_c", "continues", "recompute")  # what may follow generate
_OWN = ("checkpoint", "device")  # what may be said again when a session is resumed


@click.command("direct", short_help="Make a scene shot by shot.")
@click.argument("script", type=click.Path(path_type=Path))
@click.argument("checkpoint", type=click.Path(path_type=Path), required=False)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/direct"),
    show_default=True,
    help="Folder of the session.",
)
@click.option("--steps", type=COUNT, default=32, show_default=True, help="Euler steps.")
@click.option(
    "--shift",
    type=POSITIVE,
    default=1.0,
    show_default=True,
    help="Above 1 for more of the steps at high noise, as the base model's pipeline has it; 1 is equal steps.",
)
@click.option("--guidance", type=FINITE, default=7.5, show_default=True, help="On the texts; 1 is none.")
@click.option("--negative", metavar="TEXT", default="", help="Negative prompt of the shots.  [default: empty]")
@click.option("--negative-global", metavar="TEXT", default="", help="Negative global prompt.  [default: empty]")
@click.option(
    "--t-c", type=LEVEL, default=100.0, show_default=True, help="Noise level at which shots are seen by later ones."
)
@click.option(
    "--window", type=COUNT, help="Most shots that are seen, the current one counted.  [default: as many as in training]"
)
@click.option(
    "--size",
    metavar="FxHxW",
    help="Frames, height and width of the shots that are generated.  [default: as the first training shot]",
)
@click.option("--fps", type=FPS, help="Frames per second of the videos.  [default: as in training]")
@click.option("--bf16", is_flag=True, help="Run the model under bfloat16 autocast.")
@device
@seed
@click.pass_context
def command(
    ctx: click.Context,
    script: Path,
    checkpoint: Path | None,
    out: Path,
    size: str | None,
    window: int | None,
    fps: float | None,
    bf16: bool,
    device: torch.device,
    seed: int,
    **numbers: Any,
) -> None:
    """Make the scene of SCRIPT with CHECKPOINT, a file that lct tune or lct demo wrote, shot by shot.

    A command a line is read from the terminal, or from a pipe: generate a shot, look at it, keep it or do it again,
    choose what the next one sees. What was generated is on disk before the next line is read. lct direct FOLDER goes on
    with a session, whatever ended it.

    \b
    Examples:
      lct direct script.txt runs/demo/causal.pt --out runs/cafe
      lct direct runs/cafe

    \b
    A session:
      generate                      shot 1, as the script says
      keep
      generate t_c 300              shot 2; later shots are to see it at noise level 300
      redo                          the same with other noise
      keep
      generate from 1               shot 3 sees shot 1 alone
      branch close                  try another way from here
      generate 3 prompt "Close up of Character 1." from 1 2
      keep
      shots                         where every shot stands
      scene                         write the scene's folder
    """
    folder = out
    about: dict[str, Any] = {"bf16": bf16}
    if resumed := script.is_dir():
        said = [name for name, value in ctx.params.items() if ctx.get_parameter_source(name) != ParameterSource.DEFAULT]
        if extra := [name for name in said if name not in ("script", *_OWN)]:
            option = f"--{extra[0].replace('_', '-')}"
            raise ValueError(f"{option}: {script} is a session, which has its own settings; leave it out")
        folder, book = script, Book.read(script)
        about, seed = dict(book.about), book.settings.seed
        checkpoint = checkpoint or (Path(about["checkpoint"]) if "checkpoint" in about else None)
    if checkpoint is None:
        raise ValueError(f"CHECKPOINT: got none with {script}, expected a file that lct tune wrote")
    tuned = Tuned.load(checkpoint)
    card = tuned.card
    if tuned.pattern == "own_shot":
        raise ValueError(
            f"{checkpoint}: tuned on single shots, and makes each by itself; use bidirectional.pt or causal.pt"
        )
    from rich.console import Console

    with current_folder_on_path(), seeded(seed), torch.no_grad():
        with own_code(card.factory):
            if resumed:
                session = Session.open(folder, *tuned.build(device))
            else:
                session = Session.create(
                    folder,
                    *tuned.build(device),
                    read_script(script),
                    size=parse_size(size, card.size),
                    window=window or tuned.window,
                    pattern=tuned.pattern,
                    fps=fps or card.fps,
                    reading=card.reading,
                    about={**about, "checkpoint": str(checkpoint.absolute())},
                    seed=seed,
                    **numbers,
                )
        with torch.autocast(device.type, torch.bfloat16, enabled=about.get("bf16", False)):
            _Shell(session, Console(highlight=False, markup=False), device=device, factory=card.factory).run()


class _Wish(NamedTuple):
    """What ``generate`` is asked for: the shots, and arguments of :meth:`Session.generate`."""

    shots: tuple[int, ...]
    arguments: dict[str, Any]


class _Shell:
    """Reads commands until there are no more."""

    def __init__(self, session: Session, console: "Console", *, device: torch.device, factory: str | None) -> None:
        self.session, self.console, self.device, self.factory = session, console, device, factory
        self.commands: dict[str, tuple[str, Callable[[list[str]], None]]] = {
            "generate": ('[N ...] [from 1 3] [prompt "..."] [seed 7] [t_c 300] [continues] [recompute]', self.generate),
            "keep": ("[N ...]: the present take, or stale shots as they are", self.keep),
            "redo": ("[seed 7]: the present take with other noise", self.redo),
            "history": ("1 3 | none | recent: what the next take sees", self.history),
            "look": ("where the present take is to be seen", self.look),
            "give": ('2 hero.png [prompt "..."] [t_c 300]: a clip or image as a shot', self.give),
            "undo": ("the last change of this branch", self.undo),
            "branch": ("NAME: try another way from here", self.branch),
            "switch": ("NAME: go on with another branch", self.switch),
            "shots": ("where every shot stands", self.shots),
            "scene": ("[FOLDER]: write what is kept as a scene", self.scene),
            "save": ("keys and values too, so that resuming need not make them", self.save),
            "help": ("these lines", self.help),
            "quit": ("save, and leave", self.quit),
        }
        self.going = True

    def run(self) -> None:
        """Read and do commands until ``quit``, or the end of what there is to read; then save."""
        self.say(f"{self.session.folder}: {_standing(self.session)}. help lists the commands.")
        for line in self.lines():
            self.do(line)
            if not self.going:
                break
        self.save([])

    def lines(self) -> Iterator[str]:
        terminal = sys.stdin.isatty()
        while True:
            prompt = f"{self.session.branch_name}, shot {self.session.next}> "
            try:
                line = input(prompt) if terminal else sys.stdin.readline()
            except EOFError:
                self.say("")
                return
            except KeyboardInterrupt:
                if not terminal:
                    raise
                self.say("")
                continue
            if not terminal:
                if not line:
                    return
                if line.strip():
                    self.say(prompt + line.strip())  # so that what is written tells the whole story
            yield line

    def do(self, line: str) -> None:
        """Do one command; what is wrong with it is one line, and the session goes on."""
        try:
            words = shlex.split(line, comments=True)
            if words:
                with own_code(self.factory), within_memory(self.device, fix=_LESS_MEMORY):
                    self.find(words[0])(words[1:])
        except KeyboardInterrupt:
            self.say("interrupted: a take in progress is given up; all before it stands")
        except (ValueError, OSError, ImportError) as error:
            click.echo(f"error: {' '.join(str(error).split())}", err=True)

    def find(self, name: str) -> Callable[[list[str]], None]:
        """The command of a name, or of the beginning of one."""
        found = [name] if name in self.commands else [known for known in self.commands if known.startswith(name)]
        if len(found) != 1:
            what = f"which of {', '.join(found)}?" if found else f"expected one of {', '.join(self.commands)}"
            raise ValueError(f"{name!r}: {what}")
        return self.commands[found[0]][1]

    def generate(self, words: list[str]) -> None:
        wish = _wish(words)
        with self.making(f"shot {', '.join(map(str, wish.shots or (self.session.next,)))}") as callback:
            take = self.session.generate(*wish.shots, **wish.arguments, callback=callback)
        self.made(take)

    def redo(self, words: list[str]) -> None:
        wish = _wish(words, ("seed",))
        with self.making("redo") as callback:
            take = self.session.redo(**wish.arguments, callback=callback)
        self.made(take)

    @contextmanager
    def making(self, name: str) -> Iterator[Callback]:
        """Progress of a take."""
        from lct_core.cli.progress import Stages

        with Stages(self.console) as progress, progress(name, self.session.settings.steps) as advance:
            yield lambda _: advance()

    def made(self, take: SessionTake) -> None:
        seen = f" from {', '.join(map(str, take.history))}" if take.history else ""
        draw = f", draw {take.draw}" if take.draw else ""
        self.say(f"take {take.number}: {listed(take.shots)}{seen}, seed {take.seed}{draw}")
        self.look([])

    def keep(self, words: list[str]) -> None:
        shots = _numbers(words)
        self.session.keep(*shots)
        present, kept = self.session.present, self.session.kept
        of_take = present.shots if present and not shots else ()
        self.say("kept: " + ", ".join(f"take {kept[n]} of shot {n}" for n in shots or of_take))
        self.stale()

    def history(self, words: list[str]) -> None:
        if not words:
            raise ValueError("history: expected shots, such as 1 3; none; or recent, the last that fit the window")
        self.session.history(_history(words))

    def look(self, words: list[str]) -> None:
        _nothing(words)
        self.say("\n".join(f"  {path}" for path in self.session.look()))

    def give(self, words: list[str]) -> None:
        if len(words) < 2 or not words[0].isdecimal():
            raise ValueError("give: expected a shot and a file, such as 2 hero.png")
        wish = _wish(words[2:], ("prompt", "t_c"))
        self.session.give(int(words[0]), words[1], **wish.arguments)
        self.look([])
        self.stale()

    def undo(self, words: list[str]) -> None:
        _nothing(words)
        self.session.undo()
        self.say(_standing(self.session))

    def branch(self, words: list[str]) -> None:
        self.session.branch(_name(words))

    def switch(self, words: list[str]) -> None:
        self.session.switch(_name(words))
        self.say(_standing(self.session))

    def shots(self, words: list[str]) -> None:
        from rich import box
        from rich.table import Table

        _nothing(words)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("shot", justify="right", no_wrap=True)
        for name in ("state", "take", "sees", "t_c"):
            table.add_column(name, no_wrap=True)
        table.add_column("what is to be seen")
        for row in self.session.shots:
            take, level = "" if row.take is None else str(row.take), "" if row.t_c is None else f"{row.t_c:g}"
            cells = [str(row.shot), row.state, take, ", ".join(map(str, row.history)), level]
            table.add_row(*cells, row.text)
        self.console.print(table)

    def scene(self, words: list[str]) -> None:
        if len(words) > 1:
            raise ValueError("scene: expected a folder, or nothing")
        self.say("\n".join(f"  {path}" for path in self.session.scene(*words)))

    def save(self, words: list[str]) -> None:
        _nothing(words)
        self.session.save()

    def help(self, words: list[str]) -> None:
        _nothing(words)
        for name, (what, _) in self.commands.items():
            self.say(f"  {name:<9} {what}")
        self.say("  A command may be cut short, as long as it is the only one that begins so.")

    def quit(self, words: list[str]) -> None:
        _nothing(words)
        self.going = False

    def stale(self) -> None:
        if stale := self.session.stale:
            self.say(f"stale: {', '.join(map(str, stale))}; generate them again, or keep them as they are")

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)


def _standing(session: Session) -> str:
    kept, take = len(session.kept), session.present
    last = "no take yet" if take is None else f"the present take is {take.number}, of {listed(take.shots)}"
    return f"branch {session.branch_name}, {kept} of {len(session.shots)} shots kept; {last}"


def _wish(words: Sequence[str], known: Sequence[str] = _WORDS) -> _Wish:
    """What stands after a command: shots, then words with their values."""
    left, arguments = list(words), dict[str, Any]()
    shots = _leading(left) if "from" in known else ()
    while left:
        word = left.pop(0).replace("-", "_")
        if word not in known:
            raise ValueError(
                f"got {word!r}, expected {'shots, or ' if 'from' in known else ''}one of {', '.join(known)}"
            )
        if word == "from":
            several = [left.pop(0)] if left and left[0] in ("none", "recent") else [str(n) for n in _leading(left)]
            arguments["history"] = _history(several)
        elif word == "continues":
            arguments["continues"] = True
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


def _history(words: list[str]) -> tuple[int, ...] | None:
    if words in (["none"], ["recent"]):
        return () if words == ["none"] else None
    if not words:
        raise ValueError("from: expected shots after it, such as 1 3; none; or recent, the last that fit the window")
    return _numbers(words)


def _number(name: str, word: str, kind: type) -> Any:
    try:
        return kind(word)
    except ValueError:
        raise ValueError(f"{name}: got {word!r}, expected a number") from None


def _name(words: list[str]) -> str:
    if len(words) != 1:
        raise ValueError("expected one name after the command, such as close-up")
    return words[0]


def _nothing(words: list[str]) -> None:
    if words:
        raise ValueError(f"got {words[0]!r} after the command, expected nothing")
