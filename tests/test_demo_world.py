"""The demo's world, its measures and its contact sheet."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lct_core.data import Clip, read_scene, write_scene
from lct_core.demo.metrics import AppearanceError, adherence, appearance, appearance_error, segment
from lct_core.demo.sheet import SceneRows, contact_sheet
from lct_core.demo.world import (
    FRAMINGS,
    MOTIONS,
    POSITIONS,
    SHAPES,
    VOCABULARY,
    Scene,
    ShotDescription,
    character_mask,
    parse,
    render,
    sample_scene,
    tokenize,
)

EVERY_SHOT = [ShotDescription(*values) for values in product(FRAMINGS, SHAPES, POSITIONS, MOTIONS)]

shots = st.sampled_from(EVERY_SHOT)
seeds = st.integers(0, 2**32)


def scene_of(seed: int, num_shots: int = 4) -> Scene:
    return sample_scene(num_shots, generator=torch.Generator().manual_seed(seed))


@given(shots)
def test_text_and_description_are_inverse(shot: ShotDescription) -> None:
    assert parse(shot.text) == shot
    assert parse(f" {shot.text}\n") == shot


def test_texts_are_sentences_in_the_papers_wording() -> None:
    shot = ShotDescription("Close up", "square", "on the left", "moving up")
    assert shot.text == "[SHOT CUT] Close up of Character 1, a square, on the left, moving up."
    assert len({shot.text for shot in EVERY_SHOT}) == 54


@given(shots)
def test_tokens_are_the_words_of_the_text(shot: ShotDescription) -> None:
    tokens = tokenize(shot.text)
    assert tokens.shape == (6, len(VOCABULARY)) == (6, 13)
    assert torch.equal(tokens.sum(1), torch.ones(6))
    words = [VOCABULARY[i] for i in tokens.argmax(1)]
    assert words == sorted(words, key=shot.text.index)


@pytest.mark.parametrize(
    "text", ["", "A red square.", "[SHOT CUT] Close up of Character 2, a square, on the left, moving up."]
)
def test_other_texts_are_refused(text: str) -> None:
    for function in (parse, tokenize, lambda text: character_mask(text, size=24)):
        with pytest.raises(
            ValueError, match=r"text: got .*expected '\[SHOT CUT\] \{framing\}.*framing: Close up, Medium"
        ):
            function(text)


def test_other_attributes_are_refused() -> None:
    with pytest.raises(ValueError, match="shape: got 'star', expected one of 'square', 'disc'"):
        ShotDescription("Close up", "star", "on the left", "moving up")
    with pytest.raises(ValueError, match="num_shots: got 0, expected at least 1"):
        scene_of(0, 0)


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
def test_texts_do_not_tell_colours(one: int, other: int) -> None:
    scene = scene_of(one)
    recoloured = replace(scene, character=scene_of(other).character, background=scene_of(other).background)
    assert recoloured.texts == scene.texts
    words = {word for text in scene.texts for word, hot in zip(VOCABULARY, tokenize(text).sum(0), strict=True) if hot}
    assert words <= set(VOCABULARY)
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
    averaged = large.unflatten(4, (24, 4)).unflatten(3, (24, 4)).mean((4, 6))
    torch.testing.assert_close(averaged, small, atol=0.03, rtol=0)
    assert (averaged - small).abs().mean() < 1e-3


@given(seeds)
@settings(deadline=None, max_examples=30)
def test_ground_truth_is_perfect(seed: int) -> None:
    scene = scene_of(seed)
    frames = render(scene, size=24)
    assert appearance_error(frames, scene.texts).total < 1e-3
    assert all(adherence(shot, text) == 1 for shot, text in zip(frames, scene.texts, strict=True))
    character, background = appearance(frames[0], character_mask(scene.texts[0], size=24))
    torch.testing.assert_close(character, torch.tensor(scene.character), atol=6e-3, rtol=0)
    torch.testing.assert_close(background, torch.tensor(scene.background), atol=6e-3, rtol=0)


def test_ground_truth_survives_files(tmp_path: Path) -> None:
    for seed in range(6):
        scene, folder = scene_of(seed), tmp_path / str(seed)
        write_scene(folder, [Clip(*shot) for shot in zip(scene.texts, render(scene, size=192), strict=True)], fps=12)
        clips = read_scene(folder, area=24 * 24, fps=12)
        frames, texts = [clip.frames for clip in clips], [clip.text for clip in clips]
        assert texts == list(scene.texts)
        assert appearance_error(frames, texts).total < 0.01
        assert min(adherence(shot, text) for shot, text in zip(frames, texts, strict=True)) > 0.95
        assert (torch.stack(frames) - render(scene, size=24)).abs().mean() * 255 < 1


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
    red, green = (Scene(colour, (0.1, 0.1, 0.1), (shot,)) for colour in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)))
    error = appearance_error([render(scene, size=24)[0] for scene in (red, green)], [shot.text] * 2)
    assert error == pytest.approx((0.5**0.5, 0), abs=1e-6)
    assert error.total == error.character + error.background
    assert isinstance(error, AppearanceError)


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


def test_contact_sheet(tmp_path: Path) -> None:
    scenes = [scene_of(0, 3), scene_of(1, 2)]
    rows = [
        SceneRows(
            scene.texts, {"training data": render(scene, size=24), "noise": torch.randn(len(scene.shots), 3, 1, 24, 24)}
        )
        for scene in scenes
    ]
    contact_sheet(tmp_path / "sheet.png", rows, title="Two scenes")
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    contact_sheet(tmp_path / "plain.png", rows[:1])
    with pytest.raises(ValueError, match="scenes: got nothing to show"):
        contact_sheet(tmp_path / "none.png", [])
    with pytest.raises(
        ValueError, match=r"row 'short' of scene 0 \(counting from 0\) has 1 shots, expected one for each of its 3"
    ):
        contact_sheet(tmp_path / "none.png", [SceneRows(scenes[0].texts, {"short": render(scenes[0], size=24)[:1]})])
