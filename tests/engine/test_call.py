"""One call: what goes in, what comes out, and what is refused."""

import pytest
import torch

import lct_core as lct
from lct_core import KVCache, Layout, Shot, ShotInput
from lct_core.testing.tolerances import BOUNDS
from tests.engine.scenes import ADAPTERS, WITH_GLOBALS, draw, given_shot, random_levels, retrofitted, worst

FLOAT32 = BOUNDS[torch.float32]


# The face.


@torch.no_grad()
def test_outputs_are_nested_like_shots(fresh):
    scenes = draw(fresh.adapter, WITH_GLOBALS, batch=2)
    t = random_levels(WITH_GLOBALS, batch=2)
    row = fresh(scenes, t)
    assert [[None if x is None else x.shape for x in scene] for scene in row] == [
        [None if shot.role == "global" else shot.latents.shape for shot in scene] for scene in scenes
    ]
    one = fresh(tuple(scenes[0]), t[:, :4])  # one scene: one list, whatever kind of sequence it is
    assert one[0] is None
    assert all(torch.equal(a, b) for a, b in zip(one[1:], row[0][1:], strict=True))
    (nested,) = fresh([scenes[0]], t[:, :4])
    assert all(torch.equal(a, b) for a, b in zip(nested[1:], one[1:], strict=True))


@torch.no_grad()
def test_a_level_for_all_entries_is_a_level_for_each(fresh):
    layout = Layout([[Shot(2, (1, 2, 2)), Shot(1, (1, 1, 3))]])
    (scene,) = draw(fresh.adapter, layout, batch=3)
    t = torch.tensor([0.25, 0.75])
    for a, b in zip(fresh(scene, t), fresh(scene, t.expand(3, 2)), strict=True):
        assert torch.equal(a, b)


@ADAPTERS
@torch.no_grad()
def test_every_entry_of_a_batch_has_its_own_levels(make):
    adapter = make()
    model = retrofitted(adapter)
    layout = Layout([[Shot(2, (1, 2, 2)), Shot(1, (2, 1, 1))]])
    (scene,), t = draw(adapter, layout, batch=3), random_levels(layout, batch=3)
    together = model(scene, t)
    for entry in range(3):
        alone = [
            ShotInput(
                latents=s.latents[entry, None],
                text=s.text[entry, None],
                extras={name: x[entry, None] for name, x in s.extras.items()},
            )
            for s in scene
        ]
        got = [out[entry, None] for out in together]
        assert worst(got, model(alone, t[entry])) <= FLOAT32["definition"].absolute


@torch.no_grad()
def test_levels_map_to_the_models_own_timesteps(fresh):
    seen = []
    fresh.adapter.encode = lambda inputs, timestep, encode=fresh.adapter.encode: (
        seen.append(timestep),
        encode(inputs, timestep),
    )[1]
    (scene,) = draw(fresh.adapter, Layout([[Shot(1, (1, 1, 1)), Shot(1, (1, 1, 1))]]), batch=2)
    t = torch.tensor([[0.0, 1.0], [0.25, 0.5]])
    fresh(scene, t)
    assert torch.equal(torch.stack(seen, 1), 1000 * t)
    seen.clear()
    coarse = torch.full((2, 2), 0.7).bfloat16()
    fresh(scene, coarse)  # a level in bfloat16 is scaled in float32, not rounded again
    assert torch.equal(torch.stack(seen, 1), 1000 * coarse.float())


# What is refused.


@pytest.mark.parametrize(
    ("shots", "t", "message"),
    [
        ([], [0.5], r"^shots: got \[\], expected one scene"),
        ([[]], [0.5], r"^shots: got \[\[\]\], expected one scene"),
        ([[given_shot()], []], [0.5], r"^shots: got \[\[ShotInput\], \[\]\], .*none of them empty"),
        ([given_shot(), [given_shot()]], [0.5, 0.5], r"^shots: got \[ShotInput, \[ShotInput\]\], expected one scene"),
        (torch.zeros(1, 4, 1, 2, 2), [0.5], r"^shots: got Tensor, expected one scene, a sequence of ShotInput"),
        (
            [given_shot(channels=5)],
            [0.5],
            r"^latents: got \[1, 5, 1, 2, 2\], expected \[batch, 4, frames, height, width\]",
        ),
        (
            [ShotInput(latents=torch.zeros(4, 1, 2, 2), text=torch.zeros(1, 3, 16))],
            [0.5],
            r"^latents: got \[4, 1, 2, 2\]",
        ),
        ([ShotInput(latents=None, text=torch.zeros(1, 3, 16))], [0.5], "^latents: got None, expected"),
        (
            [given_shot(size=(1, 3, 2))],
            [0.5],
            r"^latents: got frames, height, width \(1, 3, 2\), expected positive multiples",
        ),
        (
            [given_shot(size=(0, 2, 2))],
            [0.5],
            r"^latents: .*\(0, 2, 2\), expected positive multiples of the patch \(1, 2, 2\)",
        ),
        ([given_shot(text=None)], [0.5], "^text: got None, expected a floating-point tensor"),
        ([given_shot(text=(1, 3, 15))], [0.5], r"^text: got \[1, 3, 15\], expected \[1, tokens, 16\]"),
        (
            [ShotInput(latents=torch.zeros(2, 4, 1, 2, 2), text=torch.zeros(1, 3, 16))],
            [0.5],
            r"^text: got \[1, 3, 16\], expected \[2, tokens, 16\]: one encoded prompt for every entry",
        ),
        ([given_shot(extras={"size": 1})], [0.5], r"^extras: got \['size'\], which MMDiT does not take; it takes none"),
        ([given_shot(role="dummy")], [0.5], r"^role: got 'dummy', expected"),
        (
            [given_shot(), given_shot(text=(2, 3, 16))],
            [0.5, 0.5],
            r"^shots: shot 1 has a batch of 2, expected 1 like the first",
        ),
        ([given_shot(), given_shot(role="global")], [0.5, 0.0], r"^scenes: shot 1 of scene 0 .* is global"),
        (
            [ShotInput(text=torch.zeros(1, 3, 16), role="global")],
            [0.0],
            "^shots: a global shot without latents needs a shot with latents",
        ),
        (
            [ShotInput(text=torch.zeros(1, 3, 16), role="global"), given_shot()],
            [0.5, 0.5],
            r"^t: got \[0.5, 0.5\], expected 0 for a global shot",
        ),
        (
            [ShotInput(text=torch.zeros(2, 3, 16), role="global"), given_shot(text=(2, 3, 16))],
            [[0.0, 0.5], [0.5, 0.5]],
            r"^t: got .*expected 0 for a global shot",
        ),
        ([given_shot()], [0.5, 0.5], r"^t: got \[2\], expected floating-point noise levels \[1\] or \[1, 1\]"),
        ([given_shot()], [[0.5], [0.5]], r"^t: got \[2, 1\], expected floating-point noise levels \[1\] or \[1, 1\]"),
        ([given_shot()], 0.5, r"^t: got \[\], expected floating-point noise levels"),
        ([given_shot()], [1], r"^t: got \[1\], expected floating-point noise levels"),
        ([given_shot()], None, r"^t: got None, expected floating-point noise levels"),
        (
            [given_shot()],
            [500.0],
            r"^t: got levels from 500 to 500, expected \[0, 1\].*divide a 0-1000 timestep by 1000",
        ),
        ([given_shot()], [-0.1], r"^t: got levels from -0.1 to -0.1, expected \[0, 1\]"),
        ([given_shot()], [float("nan")], r"^t: got levels from nan to nan, expected \[0, 1\]"),
    ],
)
def test_refuses(fresh, shots, t, message):
    with pytest.raises(ValueError, match=message):
        fresh(shots, None if t is None else torch.tensor(t))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pattern": "causal"},
            r"^pattern: got 'causal', expected one of \['bidirectional', 'context_causal', 'own_shot'\]",
        ),
        (
            {"pattern": lambda layout: lct.bidirectional(Layout([[Shot(1, (1, 1, 1))]]))},
            "^plan: it has 2 queries and 2 keys",
        ),
        (
            {"pattern": lambda layout: lct.selected_history(layout, [])},
            "^history: got 0 entries, expected one for each",
        ),
    ],
)
def test_refuses_patterns(fresh, options, message):
    with pytest.raises(ValueError, match=message):
        fresh([given_shot()], torch.tensor([0.5]), **options)


def test_refuses_scenes_beside_one_another_with_a_cache(fresh):
    with pytest.raises(ValueError, match=r"^cache: got 2 scenes, expected one"):
        fresh([[given_shot()], [given_shot()]], torch.tensor([0.5, 0.5]), cache=KVCache())
