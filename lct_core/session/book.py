"""What a session remembers: its settings, its takes, and for every branch the states that it went through.

All of it is in one small file, ``session.json``, which is replaced as a whole: it is what it was before a call, or what
it is after, and there is no torn line to make sense of. Undo and branches are lists of states in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from lct_core import lineage
from lct_core.files import read_json, write_json
from lct_core.generation.history import last_before
from lct_core.script import SHOT_CUT, Script, ScriptShot, parse_script
from lct_core.session.settings import Settings

FILE = "session.json"
TAKES, CACHE, SCENE = "takes", "cache", "scene"  # what else a session keeps in its folder
_FORMAT = "lct session 1"


@dataclass(frozen=True, kw_only=True)
class SessionTake:
    """One run of the loop, or a file that was given: what it was made of, so that it could be made again.

    Args:
        number: Its number in the session, from 1; its folder is ``takes/`` and this number.
        shots: The shots, from 1.
        texts: The prompt of each, without "[SHOT CUT]".
        cuts: Whether each begins with a cut.
        seen: The history: by shot, in the order in which it was seen, the take that it was.
        seed: Of the noise.
        draw: Which noise of this seed: 0, and one more for every ``redo``.
        t_c: The level, 0-1000, at which later shots see these.
        cached: Whether the history was seen through keys and values.
        file: The name of the file that was given; None for what was generated.
        digest: Of the latents' file.
    """

    number: int
    shots: tuple[int, ...]
    texts: tuple[str, ...]
    cuts: tuple[bool, ...]
    seen: Mapping[int, int]
    seed: int
    draw: int
    t_c: float
    cached: bool
    file: str | None = None
    digest: str = ""

    @property
    def history(self) -> tuple[int, ...]:
        """The shots that were seen, in this order."""
        return tuple(self.seen)

    def behind(self, shot: int) -> tuple[int, ...]:
        """The shots visible when this shot's keys and values were written."""
        return lineage.behind(self.history, self.shots, shot)

    @property
    def told(self) -> str:
        """The take in words."""
        of = f"take {self.number}: {listed(self.shots)}"
        if self.file:
            return f"{of}, given: {self.file}"
        draw = f", draw {self.draw}" if self.draw else ""
        return f"{of}, seeing {listed(self.history)}; seed {self.seed}{draw}"

    def script_shot(self, shot: int) -> ScriptShot:
        """What the script says of one of the shots."""
        i = self.shots.index(shot)
        return ScriptShot(text=self.texts[i], cut=self.cuts[i])


@dataclass(frozen=True, kw_only=True)
class BranchState:
    """Where a branch stands.

    Args:
        kept: The take of every shot that is kept, by shot.
        present: The take to be looked at, kept or done again; None before the first.
        history: What the next take is to see; None for the last shots that fit the window.
    """

    kept: Mapping[int, int] = field(default_factory=dict)
    present: int | None = None
    history: tuple[int, ...] | None = None


class ShotRow(NamedTuple):
    """Where one shot of a scene stands.

    Args:
        shot: Its number, from 1.
        text: What is to be seen.
        state: "to do"; "made", but not kept; "kept"; "given"; or "stale", see :attr:`Session.stale`.
        take: The take that is kept of it, or the present one; None for neither.
        history: What that take saw.
        t_c: The level, 0-1000, at which later shots see it.
    """

    shot: int
    text: str
    state: str
    take: int | None
    history: tuple[int, ...]
    t_c: float | None


@dataclass(frozen=True, kw_only=True)
class Book:
    """All that a session remembers but latents, pictures, keys and values. Immutable: a change is another book.

    Args:
        script: As it was at the start.
        settings: What holds for all takes.
        model: What :meth:`lct_core.SceneModel.fingerprint` says of the model.
        about: What whoever made the session keeps with it.
        takes: All takes of all branches, also those that were not kept.
        branches: The states of every branch, the present one last.
        branch: The present branch.
    """

    script: Script
    settings: Settings
    model: Mapping[str, Any]
    about: Mapping[str, Any]
    takes: tuple[SessionTake, ...] = ()
    branches: Mapping[str, tuple[BranchState, ...]] = field(default_factory=lambda: {"main": (BranchState(),)})
    branch: str = "main"

    @classmethod
    def read(cls, folder: Path) -> "Book":
        """Read what :meth:`write` wrote.

        Raises:
            FileNotFoundError: there is no session in the folder.
            ValueError: the file is cut off or edited, or of another version.
        """
        path = folder / FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, expected a session's folder; lct direct makes one")
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            got = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"{path}: its format is {got!r}, expected {_FORMAT!r}: the version that wrote it reads it")
        try:
            return cls._of(content)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: makes no sense as a session: {type(error).__name__}: {error}") from error

    @classmethod
    def _of(cls, content: Mapping[str, Any]) -> "Book":
        takes = []
        for take in content["takes"]:
            sequences = {name: tuple(take[name]) for name in ("shots", "texts", "cuts")}
            takes.append(SessionTake(**{**take, **sequences, "seen": dict(take["seen"])}))
        return cls(
            script=parse_script(content["script"]),
            settings=Settings.of(content["settings"]),
            model=content["model"],
            about=content["about"],
            takes=tuple(takes),
            branches={name: tuple(map(_state, states)) for name, states in content["branches"].items()},
            branch=content["branch"],
        )

    def write(self, folder: Path) -> None:
        """Replace the folder's ``session.json``, in one step.

        Raises:
            OSError: where it can't be written; the older one is left.
        """
        takes = [{**asdict(take), "seen": list(take.seen.items())} for take in self.takes]
        branches = {
            name: [{**asdict(state), "kept": list(state.kept.items())} for state in states]
            for name, states in self.branches.items()
        }
        content = {
            "format": _FORMAT,
            "script": self.script.render(),
            "settings": self.settings.flat(),
            "model": self.model,
            "about": self.about,
            "takes": takes,
            "branches": branches,
            "branch": self.branch,
        }
        write_json(folder / FILE, content)

    @property
    def state(self) -> BranchState:
        """Where the present branch stands."""
        return self.branches[self.branch][-1]

    def with_take(self, take: SessionTake, **changes: Any) -> Self:
        """The book with another take, after a step on the present branch.

        Args:
            take: The take.
            changes: To the branch's state.
        """
        return replace(self, takes=(*self.takes, take)).then(**changes)

    def then(self, **changes: Any) -> Self:
        """The book after a step on the present branch.

        Args:
            changes: To its state.
        """
        states = (*self.branches[self.branch], replace(self.state, **changes))
        return replace(self, branches={**self.branches, self.branch: states})

    def take(self, number: int) -> SessionTake:
        """The take of a number."""
        if not 1 <= number <= len(self.takes):
            raise LookupError(f"take {number} of {len(self.takes)}")
        return self.takes[number - 1]

    @property
    def present(self) -> SessionTake | None:
        """The take to be looked at, kept or done again."""
        return None if self.state.present is None else self.take(self.state.present)

    def kept(self, shot: int) -> SessionTake:
        """The take of a shot that is kept."""
        return self.take(self.state.kept[shot])

    def depends(self, shot: int) -> dict[int, int]:
        """The takes of other shots that a shot which is kept was made from.

        Those made with it count, if it saw them. Each of them is kept, or was once, see :attr:`BranchState.kept`.
        """
        take = self.kept(shot)
        beside = lineage.beside(take.shots, shot, in_order=self.settings.pattern == "context_causal")
        return {**take.seen, **dict.fromkeys(beside, take.number)}

    @property
    def stale(self) -> tuple[int, ...]:
        """Kept shots that saw another take of a shot than the one that is kept now, or a stale shot."""
        kept, saw = self.state.kept, self._saw
        replaced = {n for n, of in saw.items() if any(kept.get(i) != number for i, number in of.items())}
        return tuple(sorted(replaced | lineage.dependents(saw, replaced)))

    def origin(self, shot: int) -> dict[int, int]:
        """All that the keys and values of a shot that is not stale depend on: its take, those of what it saw, etc."""
        return {i: self.state.kept[i] for i in sorted(lineage.ancestors(self._saw, shot))}

    @property
    def _saw(self) -> dict[int, dict[int, int]]:
        return {shot: self.depends(shot) for shot in self.state.kept}

    def shot(self, n: int) -> ScriptShot | None:
        """What is to be seen in a shot: of its take where one is kept, else of the script; None beyond it."""
        if n in self.state.kept:
            return self.kept(n).script_shot(n)
        return self.script.shots[n - 1] if n <= len(self.script.shots) else None

    @property
    def count(self) -> int:
        """How many shots the scene has: the script's, and those kept beyond it."""
        return max([len(self.script.shots), *self.state.kept])

    @property
    def next(self) -> int:
        """The first shot that is not kept."""
        return next(n for n in range(1, self.count + 2) if n not in self.state.kept)

    @property
    def rows(self) -> list[ShotRow]:
        """A row for every shot: the scene's, and those of the present take after them."""
        present = self.present
        rows = []
        for n in range(1, max([self.count, *(present.shots if present else ())]) + 1):
            take = self.kept(n) if n in self.state.kept else present if present and n in present.shots else None
            if take is None:
                rows.append(ShotRow(n, self.script.shots[n - 1].text, "to do", None, (), None))
                continue
            state = "made" if n not in self.state.kept else "stale" if n in self.stale else "kept"
            state = "given" if take.file and state == "kept" else state
            rows.append(ShotRow(n, take.script_shot(n).text, state, take.number, take.history, take.t_c))
        return rows

    def index(self, n: int) -> int:
        """A shot's place in the scene, where a global shot comes first."""
        return n if self.script.global_prompt() else n - 1

    def text(self, n: int, prompt: str | None, continues: bool | None) -> ScriptShot:
        """What is to be seen in a take of a shot: as :meth:`shot` says, but for what the director says.

        Raises:
            ValueError: for a shot that there is not, and a prompt that the script refuses.
        """
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= self.count + 1:
            raise ValueError(f"shots: got {n!r}, expected one from 1 to {self.count}, or the next with a prompt")
        before = self.shot(n)
        if prompt is None and before is None:
            raise ValueError(f"shots: {n} is after the last, expected a prompt with it, or one from 1 to {self.count}")
        if prompt is not None and prompt.lstrip().startswith(SHOT_CUT):
            raise ValueError(f"prompt: got {prompt!r}, expected it without {SHOT_CUT}, which is put before it")
        cut = before.cut if before and continues is None else not continues
        text = ScriptShot(text=before.text if prompt is None and before else prompt or "", cut=cut)
        others = [shot for i in range(1, n) if (shot := self.shot(i))]
        replace(self.script, shots=(*others, text))  # refuses unknown characters, and more
        return text

    def seen(self, shots: Sequence[int], history: Sequence[int] | Literal["recent"] | None) -> dict[int, int]:
        """The history of a take of some shots: the take of each that is kept.

        Args:
            shots: What is made.
            history: What it sees, in this order; "recent" for the last ones that fit the window; None for what was
                chosen, or else these.

        Raises:
            ValueError: as :meth:`check_history` does, and for a shot that is not an earlier one.
        """
        first = min(shots)
        chosen = self.state.history if history is None else history
        if chosen is None or chosen == "recent":
            fresh = self.state.kept.keys() - {*self.stale}
            chosen = last_before(shots, fresh, window=self.settings.sampling.window)
        self.check_history(chosen)
        if late := [n for n in chosen if n >= first]:
            raise ValueError(f"history: got {listed(late)} for shot {first}, expected earlier ones")
        return {n: self.state.kept[n] for n in chosen}

    def check_history(self, shots: Sequence[int]) -> None:
        """Refuse what nothing can see.

        Raises:
            ValueError: for shots that are not kept, stale, or there twice.
        """
        if missing := [n for n in shots if n not in self.state.kept]:
            raise ValueError(f"history: {listed(missing)} not kept, expected some of {sorted(self.state.kept)}")
        if len(set(shots)) != len(shots):
            raise ValueError(f"history: got {list(shots)}, expected every shot once")
        if stale := [n for n in shots if n in self.stale]:
            raise ValueError(
                f"history: {listed(stale)} stale, made from what was replaced since; generate it again, or keep it as "
                "it is"
            )


def check_new(folder: Path) -> None:
    """Refuse a folder in which a session would meet another's files.

    Raises:
        FileExistsError: naming what is in the way.
    """
    if (folder / FILE).exists():
        raise FileExistsError(f"{folder}: already holds a session; go on with that, or choose another folder")
    if there := [name for name in (TAKES, CACHE, SCENE) if (folder / name).exists()]:
        raise FileExistsError(
            f"{folder / there[0]}: is there without a {FILE}, and would be overwritten; choose another folder"
        )


def listed(shots: Sequence[int]) -> str:
    """Shots in words."""
    if not shots:
        return "no other shot"
    return f"shot{'s' if len(shots) > 1 else ''} {', '.join(map(str, shots))}"


def _state(content: Mapping[str, Any]) -> BranchState:
    history: Sequence[int] | None = content["history"]
    return BranchState(
        kept=dict(content["kept"]),
        present=content["present"],
        history=None if history is None else tuple(history),
    )
