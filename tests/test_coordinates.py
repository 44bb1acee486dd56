from itertools import product

import pytest
import torch
from hypothesis import given, strategies as st

from lct_core.coordinates import check_scheme, coordinates, extent, measured_extent, shot_coordinates
from lct_core.layout import Layout, Shot
from lct_core.testing.strategies import layouts, shots

SCHEMES = ("paper", "anchored")
schemes = st.sampled_from(SCHEMES)


def by_definition(layout, scheme):
    """Section 3.2.2 and Fig. 3b, token by token."""
    row = []
    for scene in layout.scenes:
        origin = 0
        for shot in scene:
            frames, height, width = shot.grid
            if scheme == "paper":
                text = [(origin + i, origin + i, origin + i) for i in range(shot.text)]
                start = origin + shot.text
            else:
                text = [(origin, origin, origin)] * shot.text
                start = origin
            video = [
                (start + t, start + y, start + x) for t in range(frames) for y in range(height) for x in range(width)
            ]
            row += text + video if layout.text_first else video + text
            origin = start + max(frames, height, width)
    return row


def parts(layout, coords):
    """``(scene, shot, text, video)`` of every shot of the row."""
    for index, (span, shot) in enumerate(zip(layout.spans, layout.shots, strict=True)):
        scene = next(i for i, indices in enumerate(layout.scene_shots) if index in indices)
        own = coords[span.slice]
        if layout.text_first:
            yield scene, shot, own[: shot.text], own[shot.text :]
        else:
            yield scene, shot, own[shot.video :], own[: shot.video]


@given(layouts(), schemes)
def test_equals_the_definition_token_by_token(layout, scheme):
    coords = coordinates(layout, scheme=scheme)
    assert coords.dtype == torch.int64
    assert coords.shape == (layout.tokens, 3)
    assert list(map(tuple, coords.tolist())) == by_definition(layout, scheme)


def test_the_papers_figure():
    # Fig. 3b: two shots of 2 text tokens and 2 x 2 x 3 video tokens
    shot = Shot(text=2, grid=(2, 2, 3))
    coords = coordinates(Layout([[shot, shot]]))
    first, second = coords.chunk(2)
    assert first[:2].tolist() == [[0, 0, 0], [1, 1, 1]]
    assert first[2:].tolist() == [list(c) for c in product((2, 3), (2, 3), (2, 3, 4))]
    assert torch.equal(second, first + 5)


def test_the_scheme_defaults_to_the_papers():
    layout = Layout([[Shot(text=2, grid=(1, 1, 1))]])
    assert torch.equal(coordinates(layout), coordinates(layout, scheme="paper"))
    assert not torch.equal(coordinates(layout), coordinates(layout, scheme="anchored"))


@given(layouts(), schemes)
def test_every_scene_starts_at_0(layout, scheme):
    coords = coordinates(layout, scheme=scheme)
    for scene, span in zip(layout.scenes, layout.scene_spans, strict=True):
        own = coords[span.slice]
        assert own.amin(0).tolist() == [0, 0, 0]
        assert torch.equal(own, coordinates(Layout([scene], layout.text_first), scheme=scheme))


@given(layouts(), schemes)
def test_shots_of_a_scene_do_not_overlap_on_the_diagonal(layout, scheme):
    end = {}
    for scene, _, *both in parts(layout, coordinates(layout, scheme=scheme)):
        tokens = torch.cat(both)
        assert tokens.min() == end.get(scene, 0)  # no gap either
        end[scene] = tokens.max().item() + 1


@given(layouts())
def test_paper_text_and_video_do_not_overlap_on_the_diagonal(layout):
    for _, shot, text, video in parts(layout, coordinates(layout, scheme="paper")):
        assert (text == text[:, :1]).all()
        assert video.amin(0).unique().numel() == 1
        if shot.text:
            assert text.max() + 1 == video.min()


@given(shots(), layouts(max_scenes=1, with_global=False), schemes, st.booleans())
def test_relative_positions_in_a_shot_do_not_depend_on_its_place(shot, before, scheme, text_first):
    alone = coordinates(Layout([[shot]], text_first), scheme=scheme)
    behind = coordinates(Layout([[*before.shots, shot]], text_first), scheme=scheme)[before.tokens :]
    steps = (behind - alone).unique()
    assert steps.numel() == 1  # one step, the same on all axes: along the diagonal, as one body
    assert steps.item() == sum(extent(s, scheme=scheme) for s in before.shots)


@given(layouts(), schemes)
def test_text_first_permutes_rows_and_no_more(layout, scheme):
    flipped = Layout(layout.scenes, not layout.text_first)
    one, other = (list(parts(x, coordinates(x, scheme=scheme))) for x in (layout, flipped))
    for (_, _, text, video), (_, _, other_text, other_video) in zip(one, other, strict=True):
        assert torch.equal(text, other_text)
        assert torch.equal(video, other_video)


@given(layouts())
def test_without_text_the_schemes_agree(layout):
    video = layout.video_only
    assert torch.equal(coordinates(video, scheme="paper"), coordinates(video, scheme="anchored"))


@given(layouts())
def test_anchored_video_does_not_depend_on_text(layout):
    video = torch.cat([v for *_, v in parts(layout, coordinates(layout, scheme="anchored"))])
    assert torch.equal(video, coordinates(layout.video_only, scheme="anchored"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_token_grids_stand_on_the_diagonal(scheme):
    layout = Layout([[Shot(text=0, grid=(1, 1, 1))] * 4])
    assert coordinates(layout, scheme=scheme).tolist() == [[i, i, i] for i in range(4)]


@given(layouts(max_scenes=1, with_global=True), schemes)
def test_a_global_shot_takes_room_like_any_other(layout, scheme):
    dummy, *rest = layout.shots
    behind = coordinates(Layout([rest], layout.text_first), scheme=scheme) + extent(dummy, scheme=scheme)
    assert torch.equal(coordinates(layout, scheme=scheme)[dummy.tokens :], behind)
    as_shot = Layout([[Shot(text=dummy.text, grid=dummy.grid), *rest]], layout.text_first)
    assert torch.equal(coordinates(layout, scheme=scheme), coordinates(as_shot, scheme=scheme))


@given(shots(), schemes, st.booleans())
def test_a_shots_own_coordinates_and_extent(shot, scheme, text_first):
    own = shot_coordinates(shot, scheme=scheme, text_first=text_first)
    assert own.dtype == torch.int64
    assert torch.equal(own, coordinates(Layout([[shot]], text_first), scheme=scheme))
    assert extent(shot, scheme=scheme) == own.max().item() + 1
    assert measured_extent(own.double(), (1.0, 1.0, 1.0)) == extent(shot, scheme=scheme)


@pytest.mark.parametrize(
    ("coords", "unit", "steps"),
    [
        ([[0.0, 0.0, 0.0]], (1.0, 1.0, 1.0), 1),
        ([[0.0, 0.0, 0.0], [2.0, 1.0, 0.0]], (1.0, 1.0, 1.0), 3),
        ([[2.5, 1.0, 0.0]], (1.0, 1.0, 1.0), 4),  # rounded up
        ([[1.0, 6.0, 0.0]], (1.0, 2.0, 2.0), 4),  # in diagonal units, axis by axis
        ([[1.0, 6.0, 0.0]], (0.25, 2.0, 2.0), 5),
        ([[0.0, 0.0, 7.0]], (0.5, 0.5, 2.0), 5),
        ([[-3.0, -1.0, -2.0], [-3.0, 0.0, 0.0]], (1.0, 1.0, 1.0), 1),
    ],
)
def test_measured_extent_by_hand(coords, unit, steps):
    got = measured_extent(torch.tensor(coords, dtype=torch.float64), unit)
    assert (got, type(got)) == (steps, int)


@given(shots(), st.sampled_from([0.25, 0.5, 2.0, 3.0]), st.sampled_from([0.5, 1.0, 4.0]))
def test_measured_extent_is_in_diagonal_units(shot, time, space):
    unit = (time, space, space)
    own = shot_coordinates(shot, scheme="anchored").double() * torch.tensor(unit, dtype=torch.float64)
    assert measured_extent(own, unit) == extent(shot, scheme="anchored")


@given(shots(), st.sampled_from([0.1, 0.3, 1 / 3, 8 / 25]), st.sampled_from([torch.float32, torch.float64]))
def test_measured_extent_ignores_rounding(shot, unit, dtype):
    # 3 * 0.1 / 0.1 is 3.0000000000000004 in float64: no reason for one more step
    own = (shot_coordinates(shot, scheme="anchored").to(dtype) * unit).double()
    assert measured_extent(own, (unit,) * 3) == extent(shot, scheme="anchored")


@pytest.mark.parametrize(
    "call",
    [
        lambda scheme: coordinates(Layout([[Shot(text=0, grid=(1, 1, 1))]]), scheme=scheme),
        lambda scheme: shot_coordinates(Shot(text=0, grid=(1, 1, 1)), scheme=scheme),
        check_scheme,
    ],
)
@pytest.mark.parametrize("scheme", ["Paper", "interleaved", "", None])
def test_an_unknown_scheme_is_an_error(call, scheme):
    with pytest.raises(ValueError, match=rf'^scheme: got {scheme!r}, expected "paper" \(.*\) or "anchored"'):
        call(scheme)
