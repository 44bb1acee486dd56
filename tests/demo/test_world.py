"""The demo's world and its measures."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from einops import reduce
from hypothesis import given, settings, strategies as st
from matplotlib.colors import CSS4_COLORS

from lct_core.codec import LinearCodec
from lct_core.data import VideoScene, read_scene, write_scene
from lct_core.demo.metrics import (
    AppearanceError,
    adherence,
    appearance,
    appearance_error,
    composition_error,
    drift,
    segment,
)
from lct_core.demo.world import (
    ENVIRONMENT_TEXT,
    FRAMINGS,
    MOTIONS,
    POSITIONS,
    PROMPT_LENGTH,
    SHAPES,
    VOCABULARY,
    ShotDescription,
    WorldScene,
    character_mask,
    environment_image,
    identity_image,
    identity_text,
    parse,
    render,
    sample_scene,
)
from lct_core.script import SHOT_CUT, parse_script
from tests.draws import draws

EVERY_SHOT = [ShotDescription(*values) for values in product(FRAMINGS, SHAPES, POSITIONS, MOTIONS)]

shots = st.sampled_from(EVERY_SHOT)
seeds = st.integers(0, 2**32)

CODEC = LinearCodec(mean=torch.zeros(3), components=torch.eye(3), vocabulary=VOCABULARY)


def scene_of(seed: int, num_shots: int = 4) -> WorldScene:
    return sample_scene(num_shots, generator=torch.Generator().manual_seed(seed))


@given(shots)
def test_text_and_description_are_inverse(shot: ShotDescription) -> None:
    assert parse(shot.text) == shot
    assert parse(f" {SHOT_CUT} {shot.text}\n") == shot


def test_texts_are_sentences_in_the_papers_wording() -> None:
    shot = ShotDescription("Close up", "square", "on the left", "moving up")
    assert shot.text == "Close up of Character 1, a square, on the left, moving up."
    assert len({shot.text for shot in EVERY_SHOT}) == 54


def test_the_script_is_in_the_papers_format() -> None:
    script = WorldScene((1, 0, 0), (0, 0, 0), (EVERY_SHOT[0], EVERY_SHOT[1])).script
    assert script.global_prompt() == (
        "Character 1: A square of one colour. A wall of another colour. Character 1 moves about."
    )
    assert script.shot_prompts() == tuple(f"[SHOT CUT] {shot.text}" for shot in EVERY_SHOT[:2])
    assert parse_script(script.render()) == script


@given(seeds, st.integers(1, 9))
def test_every_prompt_is_made_of_phrases(seed: int, num_shots: int) -> None:
    scene = scene_of(seed, num_shots)
    marked, whole = scene.script.shot_prompts(), scene.script.global_prompt()
    brief = scene.script.global_prompt(storyline=False)
    for prompt, length in {
        **dict.fromkeys(marked, PROMPT_LENGTH),
        **dict.fromkeys(scene.texts, PROMPT_LENGTH - 1),
        whole: PROMPT_LENGTH,
        brief: PROMPT_LENGTH - 2,
        f"{SHOT_CUT} {identity_text(scene)}": PROMPT_LENGTH,
        f"{SHOT_CUT} {ENVIRONMENT_TEXT}": 3,
    }.items():
        tokens = CODEC.text(prompt)
        assert tokens.shape == (length, len(VOCABULARY))
        told = " ".join(VOCABULARY[i] for i in tokens.argmax(1)).lower()
        assert told == prompt.lower().translate(str.maketrans("", "", ".,:"))


def test_prompts_use_the_whole_vocabulary() -> None:
    scripts = [scene_of(seed).script for seed in range(30)]
    prompts = {prompt for script in scripts for prompt in (script.global_prompt(), *script.shot_prompts())}
    assert torch.cat([CODEC.text(prompt) for prompt in prompts]).any(0).all()
    assert len(VOCABULARY) == 16


def test_no_phrase_is_a_colour() -> None:
    words = {word for phrase in VOCABULARY for word in phrase.lower().split()}
    assert not words & {*CSS4_COLORS, "dark", "light", "bright", "dull", "pale", "grey", "hue"}


@pytest.mark.parametrize(
    "text", ["", SHOT_CUT, "A red square.", "Close up of Character 2, a square, on the left, moving up."]
)
def test_other_texts_are_refused(text: str) -> None:
    for function in (parse, lambda text: character_mask(text, size=24)):
        with pytest.raises(ValueError, match=r"text: got .*expected '\{framing\} of .*framing: Close up, Medium"):
            function(text)


def test_other_attributes_are_refused() -> None:
    with pytest.raises(ValueError, match="shape: got 'star', expected one of 'square', 'disc'"):
        ShotDescription("Close up", "star", "on the left", "moving up")
    with pytest.raises(ValueError, match="num_shots: got 0, expected at least 1"):
        scene_of(0, 0)
    square, disc = (ShotDescription("Close up", shape, "on the left", "moving up") for shape in SHAPES)
    with pytest.raises(ValueError, match="shots: got shots of a disc and a square, expected at least one, all of one"):
        WorldScene((1, 0, 0), (0, 0, 0), (square, disc))
    with pytest.raises(ValueError, match="shots: got no shot, expected at least one"):
        WorldScene((1, 0, 0), (0, 0, 0), ())


@given(seeds, st.integers(1, 9))
def test_scenes_follow_the_generator_alone(seed: int, num_shots: int) -> None:
    torch.manual_seed(0)
    scene = scene_of(seed, num_shots)
    torch.manual_seed(1)
    assert scene_of(seed, num_shots) == scene
    assert len(scene.shots) == len(scene.texts) == num_shots
    assert len({shot.shape for shot in scene.shots}) == 1


def test_scenes_cover_the_world() -> None:
    scenes = [scene_of(seed) for seed in range(200)]
    assert {shot for scene in scenes for shot in scene.shots} == set(EVERY_SHOT)
    assert len({scene.character for scene in scenes}) == len({scene.background for scene in scenes}) == 200


@given(seeds)
def test_character_and_background_are_well_separated(seed: int) -> None:
    scene = scene_of(seed)
    character, background = torch.tensor(scene.character), torch.tensor(scene.background)
    assert (character - background).norm() >= 0.5 - 1e-6
    assert character.amax() - character.amin() >= 0.8  # saturated
    assert background.amax() <= 0.5  # dark


@given(seeds, seeds)
def test_prompts_do_not_tell_colours(one: int, other: int) -> None:
    scene = scene_of(one)
    recoloured = replace(scene, character=scene_of(other).character, background=scene_of(other).background)
    assert recoloured.script == scene.script
    assert identity_text(recoloured) == identity_text(scene)
    assert torch.equal(character_mask(recoloured.texts[0], size=24), character_mask(scene.shots[0], size=24))


@given(shots, st.sampled_from([16, 24, 32, 40]), st.integers(1, 5))
@settings(deadline=None)
def test_masks(shot: ShotDescription, size: int, frames: int) -> None:
    mask = character_mask(shot, size=size, frames=frames)
    assert mask.shape == (frames, size, size)
    assert mask.min() == 0
    assert mask.max() <= 1
    rows, columns = (torch.arange(size) + 0.5)[:, None] / size, (torch.arange(size) + 0.5) / size
    area = mask.sum((1, 2))
    torch.testing.assert_close(area, area[:1].expand(frames), atol=0, rtol=0.03)  # never cut by an edge
    x, y = (mask * columns).sum((1, 2)) / area, (mask * rows).sum((1, 2)) / area
    torch.testing.assert_close(
        x,
        torch.full_like(x, {"on the left": 0.25, "in the middle": 0.5, "on the right": 0.75}[shot.position]),
        atol=2e-3,
        rtol=0,
    )
    speed = {"moving up": -1, "standing still": 0, "moving down": 1}[shot.motion]
    assert torch.equal(y.diff().sign() * (y.diff().abs() > 1e-3), torch.full((frames - 1,), float(speed)))
    torch.testing.assert_close(y.mean(), torch.tensor(0.5), atol=2e-3, rtol=0)


def test_masks_have_the_exact_area() -> None:
    for framing, half_side in {"Close up": 0.222, "Medium shot": 0.17, "Wide shot": 0.133}.items():
        for shape, area in {"square": 4 * half_side**2, "disc": torch.pi * half_side**2}.items():
            mask = character_mask(ShotDescription(framing, shape, "on the left", "moving up"), size=24)
            torch.testing.assert_close(mask.mean((1, 2)), torch.full((4,), area), atol=0, rtol=0.02)


def test_masks_are_not_shared() -> None:
    character_mask(EVERY_SHOT[0], size=24).fill_(7)
    assert character_mask(EVERY_SHOT[0], size=24).max() <= 1


def test_rendering_is_the_same_picture_at_any_size() -> None:
    scene = scene_of(3)
    small, large = render(scene, size=24), render(scene, size=96)
    assert small.shape == (4, 3, 4, 24, 24)
    assert small.dtype == torch.float32
    averaged = reduce(large, "k c t (y p) (x q) -> k c t y x", "mean", p=4, q=4)
    torch.testing.assert_close(averaged, small, atol=0.03, rtol=0)
    assert (averaged - small).abs().mean() < 1e-3


@given(seeds)
@settings(deadline=None, max_examples=draws(30, 600))
def test_ground_truth_is_perfect(seed: int) -> None:
    scene = scene_of(seed)
    frames = render(scene, size=24)
    assert appearance_error(list(frames), scene.texts).total < 1e-3
    assert all(adherence(shot, text) == 1 for shot, text in zip(frames, scene.texts, strict=True))
    character, background = appearance(frames[0], character_mask(scene.texts[0], size=24))
    torch.testing.assert_close(character, torch.tensor(scene.character), atol=6e-3, rtol=0)
    torch.testing.assert_close(background, torch.tensor(scene.background), atol=6e-3, rtol=0)


def test_ground_truth_survives_files(tmp_path: Path) -> None:
    for seed in range(6):
        scene, folder = scene_of(seed), tmp_path / str(seed)
        write_scene(folder, VideoScene(script=scene.script, shots=tuple(render(scene, size=192))), fps=12)
        read = read_scene(folder, area=24 * 24, fps=12)
        assert read.script == scene.script
        assert appearance_error(read.shots, scene.texts).total < 0.01
        assert min(adherence(*shot) for shot in zip(read.shots, read.script.shot_prompts(), strict=True)) > 0.95
        assert (torch.stack(read.shots) - render(scene, size=24)).abs().mean() * 255 < 1


@given(seeds)
@settings(deadline=None, max_examples=draws(20, 400))
def test_identity_images_show_the_character_alone(seed: int) -> None:
    scene = scene_of(seed)
    image = identity_image(scene, size=24)
    assert image.shape == (3, 1, 24, 24)
    assert adherence(image, identity_text(scene)) == 1
    character, wall = appearance(image, character_mask(identity_text(scene), size=24, frames=1))
    torch.testing.assert_close(character, torch.tensor(scene.character), atol=6e-3, rtol=0)
    torch.testing.assert_close(wall, wall[:1].expand(3))  # grey
    assert torch.equal(image, identity_image(replace(scene, background=(0, 1, 0)), size=24))


@given(seeds)
@settings(deadline=None, max_examples=draws(20, 400))
def test_environment_images_show_the_wall_alone(seed: int) -> None:
    scene = scene_of(seed)
    image = environment_image(scene, size=24)
    assert image.shape == (3, 1, 24, 24)
    torch.testing.assert_close(image.mean((1, 2, 3)), torch.tensor(scene.background))
    assert not segment(image).any()
    shots = render(scene, size=24, frames=1)[0]
    free = character_mask(scene.shots[0], size=24, frames=1) == 0
    assert torch.equal(image[:, free], shots[:, free])  # the wall that stands behind the character


def test_scrambled_colours_are_found() -> None:
    scenes = [scene_of(seed) for seed in range(20)]
    errors = []
    for k, scene in enumerate(scenes):
        painted = [replace(scenes[(k + j) % 20], shots=(shot,)) for j, shot in enumerate(scene.shots)]
        frames = [render(one, size=24)[0] for one in painted]
        errors.append(appearance_error(frames, scene.texts))
        assert all(adherence(shot, text) == 1 for shot, text in zip(frames, scene.texts, strict=True))
    assert sum(error.character for error in errors) / 20 > 0.4
    assert sum(error.background for error in errors) / 20 > 0.1


def test_shots_without_a_character_adhere_to_nothing() -> None:
    mush = torch.stack([render(scene_of(seed), size=24) for seed in range(20)]).mean((0, 1))
    noise = torch.rand(3, 4, 24, 24, generator=torch.Generator().manual_seed(0))
    for text in scene_of(0).texts:
        assert adherence(mush, text) == 0
        assert adherence(torch.full((3, 4, 24, 24), 0.5), text) == 0
        assert adherence(torch.full((3, 4, 24, 24), torch.nan), text) == 0
        assert adherence(noise, text) < 0.3


def test_wrong_shots_adhere_less() -> None:
    shot = ShotDescription("Medium shot", "square", "on the left", "moving up")
    scene = scene_of(0)
    for name, other in {
        "framing": "Close up",
        "position": "on the right",
        "motion": "moving down",
        "shape": "disc",
    }.items():
        frames = render(replace(scene, shots=(replace(shot, **{name: other}),)), size=24)[0]
        assert adherence(frames, shot.text) < 0.9


def test_segment_finds_the_character_anywhere() -> None:
    frames = torch.full((3, 2, 24, 24), 0.2)
    frames[0, 0, 3:6, 10:20] = 0.9
    assert torch.equal(segment(frames), frames[0] == 0.9)


def test_appearance_error_is_the_mean_distance_to_the_mean() -> None:
    shot = EVERY_SHOT[0]
    red, green = (WorldScene(colour, (0.1, 0.1, 0.1), (shot,)) for colour in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)))
    error = appearance_error([render(scene, size=24)[0] for scene in (red, green)], [shot.text] * 2)
    assert error == pytest.approx((0.5**0.5, 0), abs=1e-6)
    assert error.total == error.character + error.background
    assert isinstance(error, AppearanceError)


def test_drift_is_the_distance_to_the_first_shot() -> None:
    shot, other = EVERY_SHOT[:2]
    red, green = (WorldScene(colour, (0.2, 0.2, 0.2), (shot, other)) for colour in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)))
    frames = [*render(red, size=24), render(green, size=24)[0], render(red, size=24)[0] + 0.1]
    texts = [shot.text, other.text, f"{SHOT_CUT} {shot.text}", shot.text]
    assert drift(frames, texts) == pytest.approx([0, 0, 2**0.5, 2 * 0.03**0.5], abs=5e-3)
    with pytest.raises(ValueError, match="texts: got 1 for 4 shots, expected one per shot"):
        drift(frames, texts[:1])


def test_composition_error_is_the_distance_to_what_was_given() -> None:
    scene = WorldScene((1.0, 0.0, 0.0), (0.2, 0.2, 0.2), (EVERY_SHOT[0],))
    frames, text = render(scene, size=24)[0], scene.script.shot_prompts()[0]
    given = composition_error(frames, text, identity=scene.character, environment=scene.background)
    assert given == pytest.approx((0, 0), abs=5e-3)
    wrong = composition_error(frames, text, identity=(0.0, 1.0, 0.0), environment=(0.2, 0.2, 0.5))
    assert wrong == pytest.approx((2**0.5, 0.3), abs=5e-3)
    assert isinstance(wrong, AppearanceError)


def test_measures_refuse_what_does_not_fit() -> None:
    text, frames = EVERY_SHOT[0].text, torch.zeros(3, 4, 24, 24)
    with pytest.raises(ValueError, match="texts: got 1 for 2 shots, expected one per shot"):
        appearance_error([frames, frames], [text])
    with pytest.raises(ValueError, match="texts: got 0 for 0 shots"):
        appearance_error([], [])
    with pytest.raises(
        ValueError, match=r"frames: got shape \[3, 4, 24, 20\], expected a shot: \[3, frames, size, size\]"
    ):
        adherence(frames[..., :20], text)
    with pytest.raises(ValueError, match=r"mask: got shape \[4, 12, 12\], expected \[4, 24, 24\]"):
        appearance(frames, character_mask(text, size=12))
    with pytest.raises(ValueError, match=r"mask: no pixel of \[4, 24, 24\] is all character"):
        appearance(frames, torch.zeros(4, 24, 24))
    with pytest.raises(ValueError, match="is all background"):
        appearance(frames, torch.ones(4, 24, 24))
