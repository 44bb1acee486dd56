# ruff: noqa: RUF001 (the paper's texts have typographic quotation marks)
import copy
import pickle
import re
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given, strategies as st

from lct_core.script import SHOT_CUT, Script, ScriptShot, parse_script, read_script

TABLE_1 = """A. Global Description

A.1 Character

Character 1: A young man with short black hair, wearing a gray sweater vest.

Character 2: An older man with short graying hair,
wearing a dark suit jacket.

A.2 Environment

The scene takes place within a brightly lit bookstore. A “Staff Only” sign is visible.

The overall ambiance is warm and inviting.

A.3 Storyline

Inside a bookstore, Character 2 shares a personal anecdote about his divorce with Character 1.

B. Per-shot Description

Shot 1. Character 2 leans on a table and talks to Character 1.

Shot 2. This shot focuses solely on Character 1, still facing where Character 2 is standing.

Shot 3. The camera cuts to a young girl with two braids.

Shot 4. ...
"""
TABLE_2 = """Global Prompt\tCharacter 1: A woman in her early 30s. Character 2: A man in his early 40s. The \
scene is set in a cozy urban cafe. Character 1 is enjoying a quiet moment by a window when Character 2 enters the cafe.
Shot 1\tA wide establishing shot of the cafe’s interior view.
Shot 2\tA medium shot of Character 1 seated by a large window.
Shot 3\tA close-up of the coffee and book in Character 1’s hand.
"""
TABLE_3 = """Global Prompt\tCharacter 1: an older man. The scene is set in the interior of an art museum.
Identity\tA close-up of Character 1 with greenery and a building in the background.
Env.\tA wide shot of the art museum, showing its interior layouts.
Output\tCharacter 1 is drinking coffee in the museum.
"""
BOOKSTORE = Script(
    shots=(
        ScriptShot(text="Character 2 leans on a table and talks to Character 1."),
        ScriptShot(text="This shot focuses solely on Character 1, still facing where Character 2 is standing."),
        ScriptShot(text="The camera cuts to a young girl with two braids."),
        ScriptShot(text="..."),
    ),
    characters={
        1: "A young man with short black hair, wearing a gray sweater vest.",
        2: "An older man with short graying hair, wearing a dark suit jacket.",
    },
    environment="The scene takes place within a brightly lit bookstore. A “Staff Only” sign is visible. "
    "The overall ambiance is warm and inviting.",
    storyline="Inside a bookstore, Character 2 shares a personal anecdote about his divorce with Character 1.",
)
ONE_SHOT = (ScriptShot(text="A cat."),)

# Words that could be taken for headings, marks or references, among any others.
HARD_WORDS = """
    A. A.1 A.2 B. Global Prompt Description Per-shot Character Characters Environment Environment: Storyline Shot Shot:
    1 1. 2: Identity Env. Output : . (continues). [SHOT CUT].. \ufeff é “so” 1’s
"""
words = st.sampled_from(HARD_WORDS.split()) | st.text(min_size=1, max_size=5).filter(str.strip)
spaces = st.sampled_from([" ", "  ", "\n", "\r\n", "\t", "\n\n", "\x0b", "\u2028", "\xa0"])
plain = st.lists(words, min_size=1, max_size=8)


@st.composite
def texts(draw, ids=()):
    """A text with any whitespace, which refers to no character but the given ones."""
    references = st.sampled_from([f"Character {n}{end}" for n in sorted(ids) for end in ("", "'s", ".")] or ["a cat"])
    parts = draw(st.lists(words | references, min_size=1, max_size=8))
    text = "".join(part + draw(spaces) for part in parts)
    collapsed = " ".join(text.split())
    mentioned = {int(n) for n in re.findall("[0-9]+", collapsed)} if "haracter" in collapsed.lower() else set()
    hidden = not mentioned <= set(ids) or SHOT_CUT in collapsed or collapsed.lower().startswith("(continues)")
    return f"{draw(spaces)}a cat" if hidden else text


@st.composite
def scripts(draw):
    """Valid scripts of both forms."""
    ids = draw(st.sets(st.integers(0, 20), max_size=3))
    if draw(st.booleans()):
        head = {
            "characters": {n: draw(texts(ids)) for n in ids},
            "environment": draw(st.just("") | texts(ids)),
            "storyline": draw(st.just("") | texts(ids)),
        }
    else:
        defined = " ".join(f"Character {n}: a cat." for n in ids)
        head = {"description": f"{defined} {draw(texts(ids).filter(lambda text: ':' not in text))}"}
    cuts = [True, *draw(st.lists(st.booleans(), max_size=4))]
    return Script(shots=tuple(ScriptShot(text=draw(texts(ids)), cut=cut) for cut in cuts), **head)


@given(scripts())
def test_parse_is_the_inverse_of_render(script):
    assert parse_script(script.render()) == script
    assert parse_script(script.render()).render() == script.render()
    assert replace(script) == script


@given(scripts(), st.sampled_from(["\r\n", "\r", " \t \n", "\n\n\n"]))
def test_line_breaks_and_trailing_spaces_change_nothing(script, newline):
    assert parse_script("\ufeff" + script.render().replace("\n", newline)) == script


@given(scripts())
def test_copies_are_equal(script):
    for other in (pickle.loads(pickle.dumps(script)), copy.deepcopy(script), copy.copy(script)):
        assert other == script
        assert hash(other) == hash(script)
        assert other.global_prompt() == script.global_prompt()


@given(st.lists(plain.map(" ".join), max_size=12).map("\n".join))
def test_any_text_parses_or_is_refused_with_its_line(text):
    try:
        script = parse_script(text)
    except ValueError as error:
        assert re.match(r"line [0-9]+: ", str(error))  # noqa: PT017
    else:
        assert parse_script(script.render()) == script


@given(scripts())
def test_prompts_are_single_lines(script):
    for prompt in (script.global_prompt(), script.global_prompt(storyline=False), *script.shot_prompts()):
        assert prompt == " ".join(prompt.split())
    assert [prompt.startswith(SHOT_CUT) for prompt in script.shot_prompts()] == [shot.cut for shot in script.shots]


def test_table_1():
    assert parse_script(TABLE_1) == BOOKSTORE
    assert BOOKSTORE.global_prompt() == (
        "Character 1: A young man with short black hair, wearing a gray sweater vest. "
        "Character 2: An older man with short graying hair, wearing a dark suit jacket. "
        "The scene takes place within a brightly lit bookstore. A “Staff Only” sign is visible. "
        "The overall ambiance is warm and inviting. "
        "Inside a bookstore, Character 2 shares a personal anecdote about his divorce with Character 1."
    )
    assert BOOKSTORE.global_prompt(storyline=False) == BOOKSTORE.global_prompt().removesuffix(" " + BOOKSTORE.storyline)
    assert BOOKSTORE.shot_prompts()[2:] == (
        "[SHOT CUT] The camera cuts to a young girl with two braids.",
        "[SHOT CUT] ...",
    )


def test_table_2():
    script = parse_script(TABLE_2)
    assert script.description.startswith("Character 1: A woman in her early 30s. Character 2: A man")
    assert script.characters == {}
    assert script.global_prompt() == script.global_prompt(storyline=False) == script.description
    assert [shot.text for shot in script.shots] == [
        "A wide establishing shot of the cafe’s interior view.",
        "A medium shot of Character 1 seated by a large window.",
        "A close-up of the coffee and book in Character 1’s hand.",
    ]


def test_table_3():
    script = parse_script(TABLE_3)
    assert script == parse_script(
        TABLE_3.replace("Identity", "Shot 1").replace("Env.", "Shot 2").replace("Output", "Shot 3")
    )
    assert script.shots[1].text == "A wide shot of the art museum, showing its interior layouts."


def test_render():
    script = replace(BOOKSTORE, shots=(BOOKSTORE.shots[0], ScriptShot(text="Character 1 listens.", cut=False)))
    assert script.render() == (
        "A. Global Description\n\nA.1 Character\n\n"
        "Character 1: A young man with short black hair, wearing a gray sweater vest.\n\n"
        "Character 2: An older man with short graying hair, wearing a dark suit jacket.\n\n"
        f"A.2 Environment: {BOOKSTORE.environment}\n\nA.3 Storyline: {BOOKSTORE.storyline}\n\n"
        "B. Per-shot Description\n\n"
        "Shot 1. Character 2 leans on a table and talks to Character 1.\n\n"
        "Shot 2 (continues). Character 1 listens.\n"
    )
    assert Script(shots=ONE_SHOT).render() == "B. Per-shot Description\n\nShot 1. A cat.\n"
    assert Script(shots=ONE_SHOT, description="Dark.").render() == "Global Prompt: Dark.\n\nShot 1. A cat.\n"


@pytest.mark.parametrize(
    "text",
    [
        "A. Global Description\nA.1 Character\nCharacter 1: Ann.\nA.2 Environment\nA cafe.\n"
        "B. Per-shot Description\nShot 1. Go.",
        "a. global descriptions:\na.1. characters:\ncharacter 01 :Ann.\nA.2. ENVIRONMENTS: A\ncafe.\n"
        "B. Per-Shot Descriptions:\nSHOT 1: Go.",
        "A.2 Environment.\tA cafe.\nA.1 Character: Character 1: Ann.\nShot 1\nGo.",
        "A.1: Character\nCharacter 1:\nAnn.\nA2 Environment\n\nA\n\n\ncafe.\nB. Per shot description: Shot 1\tGo.",
        "A.1 Character\nCharacter 1: Ann.\nA.2 Environment\nA cafe.\nB. Per‑shot Description\n"
        "Shot\xa01 . [SHOT CUT] Go.",
        "A.1 Character\nCharacter 1: Ann.\nA.2 Environment\nA cafe.\nIdentity: [SHOT  CUT]\n[SHOT CUT]Go.",
    ],
)
def test_headings_vary(text):
    assert parse_script(text) == Script(shots=(ScriptShot(text="Go."),), characters={1: "Ann."}, environment="A cafe.")


@pytest.mark.parametrize("separator", ["\t", ": ", "\n", ":\n", "\t\n\n"])
def test_a_global_prompt_varies(separator):
    text = f"global prompt{separator}Dark.\nShot 1{separator}Go.\nOutput (continues){separator}On."
    shots = (ScriptShot(text="Go."), ScriptShot(text="On.", cut=False))
    assert parse_script(text) == Script(shots=shots, description="Dark.")


def test_sentences_are_no_headings():
    lines = (
        "Identity of Character 1 unknown.",
        "Identity. Env. Output.",
        "identity",
        "Outputs: none",
        "Shots 2 and 3 agree.",
        "A cat. B. too.",
        "Character 1: hello.",
        "Environment: none.",
        "Global Prompts are long.",
    )
    head = "A.1 Character\nCharacter 1: Ann.\n"
    assert parse_script(head + "Shot 1.\n" + "\n".join(lines)).shots == (ScriptShot(text=" ".join(lines)),)
    assert parse_script(head + "A.3 Storyline\nCharacter 1: hello.\nShot 1. A.").storyline == "Character 1: hello."


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", 1, "no shot, expected at least one"),
        ("A.2 Environment: A cafe.\n\n", 2, "no shot, expected at least one"),
        ("\nOnce.\nShot 1. A.", 2, "got 'Once.', expected one of 'A. Global Description'"),
        (f"{'a' * 60}", 1, f"got '{'a' * 47}...', expected"),
        ("A. Global Description: dark.\nShot 1. A.", 1, "got 'dark.', expected"),
        ("A.1 Character\nAnn.\nShot 1. A.", 2, "got 'Ann.', expected .* below 'A.1 Character', 'Character 1: ...'"),
        ("B. Per-shot Description\nA cafe.\nShot 1. A.", 2, "got 'A cafe.', expected"),
        ("A.2 Environment\nA cafe.\nA.3 Plot\nB.\nShot 1. A.", 3, "got 'A.3 Plot', expected .* 'A.3 Storyline'"),
        ("A.2 Environment A cafe.\nShot 1. A.", 1, "got 'A.2 Environment A cafe.', expected"),
        ("A.2 Environment\nA cafe.\nB. Shots\nShot 1. A.", 3, "got 'B. Shots', expected"),
        ("Shot 1. A.\nShot 2 - B.", 2, "got 'Shot 2 - B.', expected .* has to be joined"),
        ("Shot 1. A.\nShot 2 (continued). B.", 2, "got 'Shot 2 .continued.. B.', expected"),
        ("A.1 Character\n\nShot 1. A.", 1, "'A.1 Character' has no 'Character 1: ...'"),
        ("A.1 Character\nCharacter 1:\nCharacter 2: B.\nShot 1. A.", 2, "Character 1 has no text"),
        ("A.1 Character\nCharacter 1: A.\nCharacter 1: B.", 3, "got 'Character 1: B.', but Character 1 is on line 2"),
        ("A.2 Environment\n\nA.3 Storyline: A.\nShot 1. A.", 1, "the environment has no text"),
        ("A.3 Storyline\nB. Per-shot Description\nShot 1. A.", 1, "the storyline has no text"),
        ("A.2 Environment: A.\nA.2 Environments: B.", 2, "but A.2 Environment is on line 1 already"),
        ("Global Prompt\nShot 1. A.", 1, "the description has no text"),
        ("Global Prompt: A.\nGlobal Prompt: A.", 2, "but Global Prompt is on line 1 already"),
        ("Global Prompt: A.\nB. Per-shot Description\nShot 1. A.", 2, "after 'Global Prompt', expected one form"),
        ("A.2 Environment: A.\nGlobal Prompt: A.\nShot 1. A.", 2, "after 'A.2 Environment', expected one form"),
        ("Shot 1. A.\nA.2 Environment: A.", 2, "got 'A.2 Environment: A.' among the shots"),
        ("Shot 1. A.\nB. Per-shot Description", 2, "among the shots, expected it above them"),
        ("B. Per-shot Description\nA.2 Environment: A.\nShot 1. A.", 2, "among the shots"),
        ("Identity: A.\nGlobal Prompt: A.", 2, "among the shots"),
        ("\nShot 2. A.", 2, "got 'Shot 2. A.', expected Shot 1"),
        ("Shot 0. A.", 1, "expected Shot 1"),
        ("Shot 1. A.\nShot 3. C.\nShot 2. B.", 2, "got 'Shot 3. C.', expected Shot 2"),
        ("Identity: A.\nShot 1. B.", 2, "Shot 1 is on line 1 already"),
        ("Shot 1. A.\n\nShot 2. B.\nShot 1. A.", 4, "got 'Shot 1. A.', but Shot 1 is on line 1 already"),
        ("Shot 1. A.\n\nShot 2.\n\n", 3, "shot 2 has no text"),
        ("Shot 1. A.\nShot 2. [SHOT CUT]", 2, "shot 2 has no text"),
        ("Shot 1 (continues). A.", 1, "shot 1 goes on from the shot before"),
        ("Shot 1. A.\nShot 2 (continues).\n[SHOT CUT] B.", 3, r"shot 2 has \[SHOT CUT\] in its text"),
        ("Shot 1. [SHOT CUT] A.\nB. [SHOT\nCUT] C.", 2, "got 'B. .SHOT', expected"),
        ("Shot 1. A.\nShot 2. (Continues) B.", 2, r'shot 2 has .continues. in its text.*"Shot 2 .continues.. \.\.\."'),
    ],
)
def test_a_wrong_script_is_refused_with_its_line(text, line, words):
    with pytest.raises(ValueError, match=rf"^line {line}: .*{words}"):
        parse_script(text)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("Shot 1. A.\nCharacter 1 goes.", 2, "shot 1 refers to Character 1, but the script defines no character;"),
        ("A.1 Character\nCharacter 1: A.\nShot 1. Go.\n\nCharacter\n12’s hat.", 5, "shot 1 refers to Character 12"),
        (
            "A.1 Character\nCharacter 12: A.\nShot 1. [SHOT CUT] a b\n[c] Character 1",
            4,
            "refers to Character 1, but .* Character 12;",
        ),
        ("A.1 Character\nCharacter 1: A.\nCharacter 2 (Ann): B.\nShot 1. A.", 3, "Character 1 refers to Character 2"),
        (
            "A.1 Character\nCharacter 1: A.\nA.2 Environment\nDark.\nCharacter 3's room.\nShot 1. A.",
            5,
            "the environment refers to Character 3",
        ),
        (
            "A.1 Character\nCharacter 1: A.\nA.3 Storyline: character 3 goes.\nShot 1. A.",
            3,
            "the storyline refers to Character 3",
        ),
        (
            "A.1 Character\nCharacter 1: A.\nShot 1. A.\nShot 2. A.\nCharacters 1, 2 and 3.",
            5,
            "shot 2 refers to Character 2, but",
        ),
        (
            "Global Prompt: Character 1: A.\nCharacter 3: C.\nShot 1. Character 2.",
            3,
            "script defines Character 1, Character 3; correct",
        ),
        (
            "Global Prompt: Character 1: A.\nHe meets Character 2.\nShot 1. A.",
            2,
            "the description refers to Character 2",
        ),
        ("Global Prompt: Character 1: A.\nDark.\nCharacter 1: B.\nShot 1. A.", 3, "Character 1 is defined twice"),
    ],
)
def test_an_undefined_character_is_refused_with_its_line(text, line, words):
    with pytest.raises(ValueError, match=rf"^line {line}: .*{words}"):
        parse_script(text)


def test_other_words_are_no_references():
    text = (
        "Two characters, both characters and a character. Characterful 3. Character [7], one of the characters. 5 cats."
    )
    assert Script(shots=(ScriptShot(text=text),)).shots[0].text == text
    script = Script(
        shots=(ScriptShot(text="Character 1 and 2 cats. Characters 1 and 12 go."),), characters={1: "A.", 12: "B."}
    )
    assert parse_script(script.render()) == script


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"shots": ()}, "shots: no shot, expected at least one"),
        ({"shots": ("A cat.",)}, "shots: shot 1 is 'A cat.', expected a ScriptShot"),
        ({"shots": (*ONE_SHOT, ScriptShot(text=" \n"))}, "shots: shot 2 has no text"),
        ({"shots": (ScriptShot(text="A.", cut=False),)}, "shots: shot 1 goes on from the shot before"),
        ({"shots": (*ONE_SHOT, ScriptShot(text="Character 3."))}, "shots: shot 2 refers to Character 3"),
        ({"shots": (ScriptShot(text="(continues) A."),)}, "shots: shot 1 has .continues. in its text"),
        ({"shots": (*ONE_SHOT, ScriptShot(text="[SHOT CUT] A.", cut=False))}, "shots: shot 2 has .SHOT CUT. in its"),
        ({"shots": (ScriptShot(text="A. [SHOT CUT] B."),)}, "shots: shot 1 has .SHOT CUT. in its text"),
        ({"characters": {1: ""}}, "characters: Character 1 has no text"),
        ({"characters": {1: "Like Character 2."}}, "characters: Character 1 refers to Character 2"),
        ({"characters": {"1": "A."}}, "characters: got the ID '1', expected an int"),
        ({"characters": {-1: "A."}}, "characters: got the ID -1, expected an int"),
        ({"characters": {True: "A."}}, "characters: got the ID True, expected an int"),
        ({"environment": "Character 1's room."}, "environment: the environment refers to Character 1"),
        ({"environment": "[SHOT CUT] Dark."}, "environment: the environment has .SHOT CUT. in its text"),
        ({"storyline": "Character 1 goes."}, "storyline: the storyline refers to Character 1"),
        ({"description": "Character 1 goes."}, "description: the description refers to Character 1"),
        ({"description": "Character 1: A. Character 1: B."}, "description: Character 1 is defined twice"),
        ({"description": "A.", "storyline": "B."}, "description: got a global prompt in one text and also"),
        ({"description": "A.", "environment": "B."}, "description: got a global prompt in one text and also"),
        ({"description": "A.", "characters": {1: "B."}}, "description: got a global prompt in one text and also"),
    ],
)
def test_a_wrong_script_from_code_is_refused_with_its_field(fields, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        Script(**{"shots": ONE_SHOT, **fields})


def test_texts_are_normalised():
    script = Script(
        shots=[ScriptShot(text=" [SHOT\nCUT] [SHOT CUT]\tA \r\n\n cat. "), ScriptShot(text="\tOn.", cut=False)],
        characters={2: " B\n b", 1: "A"},
        environment="\xa0Dark.\u2028Cold. ",
    )
    assert script.shots == (ScriptShot(text="A cat."), ScriptShot(text="On.", cut=False))
    assert script.shot_prompts() == ("[SHOT CUT] A cat.", "On.")
    assert list(script.characters.items()) == [(1, "A"), (2, "B b")]
    assert script.global_prompt() == "Character 1: A Character 2: B b Dark. Cold."


def test_a_script_without_global_description():
    script = parse_script("Shot 1. A cat.")
    assert script == Script(shots=ONE_SHOT)
    assert script.global_prompt() == script.global_prompt(storyline=False) == ""
    assert Script(shots=ONE_SHOT, storyline="Once.").global_prompt(storyline=False) == ""


def test_a_script_is_an_immutable_value():
    characters = {1: "Ann."}
    script = Script(shots=ONE_SHOT, characters=characters)
    characters[1] = "Bob."
    assert script.characters == {1: "Ann."}
    assert script == Script(shots=ONE_SHOT, characters={1: "Ann."}) != Script(shots=ONE_SHOT, characters=characters)
    with pytest.raises(TypeError):
        script.characters[1] = "Bob."
    with pytest.raises(FrozenInstanceError):
        script.storyline = "Once."
    with pytest.raises(FrozenInstanceError):
        script.shots[0].cut = False


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_read_script(tmp_path, encoding):
    path = tmp_path / "script.txt"
    path.write_bytes(TABLE_1.replace("\n", "\r\n").encode(encoding))
    assert read_script(path) == read_script(str(path)) == BOOKSTORE


def test_read_script_names_the_path(tmp_path):
    path = tmp_path / "script.txt"
    with pytest.raises(FileNotFoundError, match=rf"^{re.escape(str(path))}: no such file, expected a script file"):
        read_script(path)
    with pytest.raises(FileNotFoundError, match=rf"^{re.escape(str(tmp_path))}: a folder, expected a script file"):
        read_script(tmp_path)
    path.write_bytes("Shot 1. Caf\xe9.".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: not UTF-8: .*position 11.*save it as UTF-8"):
        read_script(path)
    path.write_text("Shot 1. A.\nShot 3. B.", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: line 2: got 'Shot 3. B.', expected Shot 2"):
        read_script(path)
