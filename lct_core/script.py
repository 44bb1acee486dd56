"""The two-tier prompt script of a scene: what all its shots share, and what happens in each (paper, 3.2.1).

A script file has one of two forms, both from the paper's supplement, C. In parts (Table 1), where any part of A may be
missing::

    A. Global Description
    A.1 Character
    Character 1: A young man in a blue apron.
    A.2 Environment
    The scene takes place within a brightly lit bookstore.
    A.3 Storyline
    Character 1 waits for a customer.
    B. Per-shot Description
    Shot 1. Character 1 leans on a table.
    Shot 2 (continues). Character 1 looks up.

With the global prompt in one text (Tables 2, 3)::

    Global Prompt: Character 1: A young man in a blue apron. The scene takes place within a brightly lit bookstore.
    Shot 1: Character 1 leans on a table.

A text follows its heading on the same line, after a colon, dot or tab, or below it, over any number of lines. Case,
plurals and punctuation of a heading are free. A shot called Identity, Env. or Output (Table 3) has the number of its
place. "(continues)", for a shot that begins without a cut, is ours.
"""

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from pathlib import Path
from types import MappingProxyType

__all__ = ["SHOT_CUT", "Script", "ScriptShot", "parse_script", "read_script"]

SHOT_CUT = "[SHOT CUT]"
"""The mark before the prompt of a shot that begins with a cut (paper, 3.2.1)."""

_CONTINUES = "(continues)"
_CHARACTERS, _PER_SHOT, _ONE_TEXT = "A.1 Character", "B. Per-shot Description", "Global Prompt"
_SECTIONS = {  # what may stand above the shots, and the field its text fills: none where other headings follow
    "A. Global Description": "",
    _CHARACTERS: "",
    "A.2 Environment": "environment",
    "A.3 Storyline": "storyline",
    _PER_SHOT: "",
    _ONE_TEXT: "description",
}
_SINGLE = tuple(name for name in _SECTIONS.values() if name)
_EXPECTED = ", ".join(map(repr, _SECTIONS)) + f", 'Shot 1. ...' or, below {_CHARACTERS!r}, 'Character 1: ...'"
_SECTION_HEADINGS = {
    name: re.compile(r"\W*".join(re.findall(r"\w+", name)) + r"s?\s*(?:[.:\t]|$)", re.IGNORECASE) for name in _SECTIONS
}
_CHARACTER_HEADING = re.compile(r"character\s+([0-9]+)\s*:", re.IGNORECASE)
_SHOT_HEADING = re.compile(
    r"(?:shot\s+([0-9]+)|(?-i:Identity|Env\.|Output)(?!\s*\.))\s*(\(continues\))?\s*(?:[.:\t]|$)", re.IGNORECASE
)
_LIKE_A_HEADING = re.compile(r"[AB]\.[\s0-9]|shot\s+[0-9]", re.IGNORECASE)
_DEFINITION = re.compile(r"\bcharacter ([0-9]+) ?:", re.IGNORECASE)
_REFERENCE = re.compile(r"\bcharacter [0-9]+|\bcharacters [0-9]+(?:(?:,|,? and|,? or) [0-9]+)*", re.IGNORECASE)

_Key = tuple[str, int]  # the field that a text belongs to, and its number there: 0 where there is but one


@dataclass(frozen=True, kw_only=True)
class ScriptShot:
    """What happens in one shot.

    Args:
        text: The shot's prompt without the mark: a leading ``[SHOT CUT]`` is taken off. Whitespace becomes single
            spaces.
        cut: Whether the shot begins with a cut (default: paper). One without goes on from the shot before, and its
            prompt has no mark (paper, 4.3, single-shot extension).
    """

    text: str
    cut: bool = True

    def __post_init__(self) -> None:
        text = _collapse(self.text)
        while self.cut and text.startswith(SHOT_CUT):
            text = text.removeprefix(SHOT_CUT).lstrip()
        object.__setattr__(self, "text", text)


@dataclass(frozen=True, kw_only=True)
class Script:
    """A scene's script: a global description, in parts or in one text, and its shots.

    Immutable, compared by value. Texts refer to characters as "Character 1", "Character 2", ...; each must be defined.
    In all texts, whitespace becomes single spaces.

    Args:
        shots: What happens, shot by shot; at least one, the first with a cut.
        characters: What each character looks like, by ID (0 or more); kept in the order of the IDs.
        environment: Where the scene takes place.
        storyline: The story overview.
        description: A global prompt in one text, instead of the three above; "Character 1: ..." in it defines one.

    Raises:
        ValueError: no shot; an empty text; a character referred to but not defined, or defined twice; a first shot
            without a cut; ``[SHOT CUT]`` inside a text; a global description both in parts and in one text.
    """

    shots: tuple[ScriptShot, ...]
    characters: Mapping[int, str] = field(default_factory=dict, hash=False)
    environment: str = ""
    storyline: str = ""
    description: str = ""

    def __post_init__(self) -> None:
        for number, shot in enumerate(self.shots, 1):
            if not isinstance(shot, ScriptShot):
                raise ValueError(f"shots: shot {number} is {shot!r}, expected a ScriptShot; write ScriptShot(text=...)")
        for number in self.characters:
            if not isinstance(number, int) or isinstance(number, bool) or number < 0:
                raise ValueError(f"characters: got the ID {number!r}, expected an int, 0 or more")
        characters = {number: _collapse(self.characters[number]) for number in sorted(self.characters)}
        object.__setattr__(self, "shots", tuple(self.shots))
        object.__setattr__(self, "characters", MappingProxyType(characters))
        for name in _SINGLE:
            object.__setattr__(self, name, _collapse(getattr(self, name)))
        if self.description and (self.characters or self.environment or self.storyline):
            raise ValueError(
                "description: got a global prompt in one text and also characters, environment or storyline, "
                "expected one or the other; leave the description out, or write all of it there"
            )
        texts = self._global_texts | {("shots", number): shot.text for number, shot in enumerate(self.shots, 1)}
        continued = {number for number, shot in enumerate(self.shots, 1) if not shot.cut}
        for (name, _), _, fault in _faults(texts, continued):
            raise ValueError(f"{name}: {fault}")

    def __reduce__(self) -> tuple[partial["Script"], tuple[()]]:  # a mapping proxy can't be pickled
        return partial(type(self), **{**vars(self), "characters": dict(self.characters)}), ()

    @property
    def _global_texts(self) -> dict[_Key, str]:
        texts: dict[_Key, str] = {("characters", number): text for number, text in self.characters.items()}
        return texts | {(name, 0): getattr(self, name) for name in _SINGLE if getattr(self, name)}

    def global_prompt(self, *, storyline: bool = True) -> str:
        """Join the global description as a model reads it: "[Character] [Environment] [Story]" (paper, 3.2.1).

        Args:
            storyline: Whether to keep the story overview, which training omits at random (supplement, A.1). It can't be
                told apart in a description of one text, which comes back whole.

        Returns:
            One line, "Character 1: ... Character 2: ... The scene ..."; empty for a script without global description.
        """
        return " ".join(
            f"Character {number}: {text}" if name == "characters" else text
            for (name, number), text in self._global_texts.items()
            if storyline or name != "storyline"
        )

    def shot_prompts(self) -> tuple[str, ...]:
        """Give every shot's prompt as a model reads it: "[SHOT CUT] ..." or, without a cut, the text alone."""
        return tuple(f"{SHOT_CUT} {shot.text}" if shot.cut else shot.text for shot in self.shots)

    def render(self) -> str:
        """Write the script as a file: in parts as Table 1, or with its description in one text as Table 2.

        ``parse_script`` is the inverse. Every text is on its heading's line (ours), so none is mistaken for a heading.
        """
        blocks = []
        if self._global_texts and not self.description:
            blocks.append("A. Global Description")
        if self.characters:
            blocks.append(_CHARACTERS)
        headings = {name: heading for heading, name in _SECTIONS.items()} | {"characters": "Character {}"}
        blocks += [f"{headings[name].format(number)}: {text}" for (name, number), text in self._global_texts.items()]
        if not self.description:
            blocks.append(_PER_SHOT)
        for number, shot in enumerate(self.shots, 1):
            blocks.append(f"Shot {number}. {shot.text}" if shot.cut else f"Shot {number} {_CONTINUES}. {shot.text}")
        return "\n\n".join(blocks) + "\n"


def _collapse(text: str) -> str:
    return " ".join(text.split())


def _faults(texts: Mapping[_Key, str], continued: Container[int]) -> Iterator[tuple[_Key, int | None, str]]:
    """Say what is wrong in a script's texts: in which, where in it (None: not at any word), and what."""
    if not any(name == "shots" for name, _ in texts):
        yield ("shots", 0), None, 'no shot, expected at least one: "Shot 1. ..."'
    defined = {number for name, number in texts if name == "characters"}
    for match in _DEFINITION.finditer(texts.get(("description", 0), "")):
        if int(match[1]) in defined:
            fault = f"Character {match[1]} is defined twice; keep one definition, or leave the colon out"
            yield ("description", 0), match.start(), fault
        defined.add(int(match[1]))
    known = ", ".join(f"Character {number}" for number in sorted(defined)) or "no character"

    for (name, number), text in texts.items():
        key = name, number
        who = {"shots": "shot {}", "characters": "Character {}"}.get(name, f"the {name}").format(number)
        if not text:
            yield key, None, f"{who} has no text; write one, or leave it out"
        for mention in _REFERENCE.finditer(text):
            for unknown in sorted(set(map(int, re.findall("[0-9]+", mention[0]))) - defined):
                fault = f"{who} refers to Character {unknown}, but the script defines {known}"
                fix = f'correct the number, or define it: "Character {unknown}: ..."'
                yield key, mention.start(), f"{fault}; {fix}"
        if SHOT_CUT in text:
            fault = f"{who} has {SHOT_CUT} in its text, expected it only before the text of a shot with a cut"
            yield key, text.index(SHOT_CUT), f"{fault}; take it out"
        if name == "shots" and text.lower().startswith(_CONTINUES):
            fault = f"{who} has {_CONTINUES} in its text, expected it in the heading"
            yield key, 0, f'{fault}; write "Shot {number} {_CONTINUES}. ..."'
        if key == ("shots", 1) and number in continued:
            yield key, None, "shot 1 goes on from the shot before, but there is none; let it begin with a cut"


def parse_script(text: str) -> Script:
    """Read a script of either form; the inverse of ``Script.render``.

    Args:
        text: The script; the two forms stand at the top of this module.

    Raises:
        ValueError: whatever ``Script`` refuses; a heading that comes twice, is misspelt or in the wrong place; a text
            without heading; a heading without text; shots not numbered 1, 2, 3, ...; both forms in one script. The
            message begins with the line, counted from 1.
    """
    headings: dict[str, int] = {}  # the line of each
    words: dict[_Key, list[tuple[int, str]]] = {}  # of each text, with their lines; the first, empty, is the heading's
    continued: set[int] = set()
    key: _Key | None = None
    section, shots, line = "", 0, 1
    for line, row in enumerate(StringIO(text.removeprefix("\ufeff"), newline=None), 1):
        rest = row.strip()
        while rest:
            got = f"line {line}: got {(rest if len(rest) <= 50 else rest[:47] + '...')!r}"
            heading = _heading(rest, in_characters=section == _CHARACTERS and not shots, place=shots + 1)
            if heading is None:
                if key is None or _LIKE_A_HEADING.match(rest):
                    raise ValueError(
                        f"{got}, expected one of {_EXPECTED}; text comes after a heading, "
                        "and a line of it that begins like one has to be joined to the line before"
                    )
                words[key] += [(line, word) for word in rest.split()]
                break
            name, key, continues, end = heading
            if name in headings:
                raise ValueError(f"{got}, but {name} is on line {headings[name]} already; keep one of them")
            if name in _SECTIONS:
                if shots or _PER_SHOT in headings:
                    raise ValueError(f"{got} among the shots, expected it above them; move it up")
                if headings and _ONE_TEXT in (name, *headings):
                    raise ValueError(
                        f"{got} after {next(iter(headings))!r}, expected one form of script; "
                        f"keep either {_ONE_TEXT!r} or the headings A and B"
                    )
                section = name
            headings[name] = line
            rest = rest[end:].strip()
            if key is None:
                continue  # the next heading may stand on the same line
            if key[0] == "shots":
                shots += 1
                if key[1] != shots:
                    raise ValueError(f"{got}, expected Shot {shots}; add it, or number the shots 1, 2, 3, ...")
                if continues:
                    continued.add(shots)
            words[key] = [(line, ""), *((line, word) for word in rest.split())]
            break

    texts = {key: " ".join(word for _, word in words[key][1:]) for key in words}
    script_shots = tuple(ScriptShot(text=texts["shots", n], cut=n not in continued) for n in range(1, shots + 1))
    texts |= {("shots", n): shot.text for n, shot in enumerate(script_shots, 1)}
    characters = {n: text for (name, n), text in texts.items() if name == "characters"}
    if _CHARACTERS in headings and not characters:
        raise ValueError(
            f"line {headings[_CHARACTERS]}: {_CHARACTERS!r} has no 'Character 1: ...'; write one, or leave it out"
        )
    for key, at, fault in _faults(texts, continued):
        # words are counted from the end, since a mark may have been taken off the start
        where, _ = words.get(key, [(line, "")])[0 if at is None else -1 - texts[key].count(" ", at)]
        raise ValueError(f"line {where}: {fault}")
    return Script(shots=script_shots, characters=characters, **{name: texts.get((name, 0), "") for name in _SINGLE})


def _heading(row: str, *, in_characters: bool, place: int) -> tuple[str, _Key | None, bool, int] | None:
    """Give a heading's name, the key of the text after it, whether it says ``(continues)``, and where it ends."""
    for name, pattern in _SECTION_HEADINGS.items():
        if match := pattern.match(row):
            return name, (_SECTIONS[name], 0) if _SECTIONS[name] else None, False, match.end()
    if in_characters and (match := _CHARACTER_HEADING.match(row)):
        return f"Character {int(match[1])}", ("characters", int(match[1])), False, match.end()
    if match := _SHOT_HEADING.match(row):
        number = int(match[1] or place)
        return f"Shot {number}", ("shots", number), bool(match[2]), match.end()
    return None


def read_script(path: str | Path) -> Script:
    """Read a script file (UTF-8); ``parse_script`` says what it may hold.

    Raises:
        FileNotFoundError: there is no such file, or it is a folder.
        ValueError: it is not UTF-8, or not a valid script. Every message begins with the path.
    """
    path = Path(path)
    if not path.exists() or path.is_dir():
        raise FileNotFoundError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}, expected a script file")
    try:
        return parse_script(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}; save it as UTF-8") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
