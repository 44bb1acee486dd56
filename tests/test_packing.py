import pytest
import torch
from hypothesis import given, strategies as st

from lct_core.layout import Layout, Shot
from lct_core.packing import pack, unpack
from lct_core.testing.strategies import layouts

LAYOUT = Layout([[Shot(text=2, grid=(1, 2, 3)), Shot(text=0, grid=(2, 1, 1))], [Shot(text=1, grid=(1, 1, 1))]])


def make_scenes(layout, *, batch=1, rest=(4,), dtype=torch.float32):
    return [
        [
            (torch.randn(batch, shot.text, *rest).to(dtype), torch.randn(batch, *shot.grid, *rest).to(dtype))
            for shot in scene
        ]
        for scene in layout.scenes
    ]


def flatten(scenes):
    return [tensor for scene in scenes for pair in scene for tensor in pair]


@given(
    layout=layouts(),
    batch=st.integers(1, 3),
    rest=st.sampled_from([(), (4,), (2, 3)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
)
def test_unpack_inverts_pack(layout, batch, rest, dtype):
    scenes = make_scenes(layout, batch=batch, rest=rest, dtype=dtype)
    row = pack(scenes, layout)
    assert (row.shape, row.dtype) == ((batch, layout.tokens, *rest), dtype)
    back = unpack(row, layout)
    assert [len(scene) for scene in back] == [len(scene) for scene in layout.scenes]
    for got, expected in zip(flatten(back), flatten(scenes), strict=True):
        assert got.shape == expected.shape
        assert torch.equal(got, expected)


@given(layout=layouts(), batch=st.integers(1, 3), rest=st.sampled_from([(), (4,), (2, 3)]))
def test_pack_inverts_unpack(layout, batch, rest):
    row = torch.randn(batch, layout.tokens, *rest)
    assert torch.equal(pack(unpack(row, layout), layout), row)


@given(layouts())
def test_unpack_returns_views_and_pack_a_copy(layout):
    row = torch.zeros(2, layout.tokens, 3)
    scenes = unpack(row, layout)
    for tensor in flatten(scenes):
        tensor += 1
    assert torch.equal(row, torch.ones_like(row))
    pack(scenes, layout).zero_()
    assert torch.equal(row, torch.ones_like(row))


def test_order_in_the_row():
    row = torch.arange(LAYOUT.tokens)[None]
    text, video = unpack(row, LAYOUT)[0][0]
    assert text.tolist() == [[0, 1]]
    assert video.tolist() == [[[[2, 3, 4], [5, 6, 7]]]]
    text, video = unpack(row, Layout(LAYOUT.scenes, text_first=False))[0][0]
    assert video.tolist() == [[[[0, 1, 2], [3, 4, 5]]]]
    assert text.tolist() == [[6, 7]]


def test_global_shots_are_shots():
    layout = Layout([[Shot(text=3, grid=(1, 2, 2), role="global"), Shot(text=1, grid=(2, 2, 2))]])
    scenes = make_scenes(layout)
    assert torch.equal(unpack(pack(scenes, layout), layout)[0][0][0], scenes[0][0][0])


def test_gradients_pass_both_ways():
    scenes = make_scenes(LAYOUT)
    for tensor in flatten(scenes):
        tensor.requires_grad_()
    sum(tensor.sum() for tensor in flatten(unpack(pack(scenes, LAYOUT), LAYOUT))).backward()
    assert all(torch.equal(tensor.grad, torch.ones_like(tensor)) for tensor in flatten(scenes))


def drop_scene(scenes):
    del scenes[1]


def drop_shot(scenes):
    del scenes[0][1]


def drop_text(scenes):
    scenes[0][1] = (scenes[0][1][1],)


def flatten_pair(scenes):
    scenes[0] = scenes[0][0]


def put(scene, shot, part, tensor):
    def change(scenes):
        pair = list(scenes[scene][shot])
        pair[part] = tensor
        scenes[scene][shot] = tuple(pair)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_scene, "got 1 scenes, expected 2 as in the layout"),
        (drop_shot, r"scene 0 \(counting from 0\) has 1 shots, expected 2"),
        (drop_text, r"shot 1 of scene 0 \(counting from 0\) is a tuple, expected a pair of tensors"),
        (flatten_pair, r"shot 0 of scene 0 \(counting from 0\) is a Tensor, expected a pair of tensors"),
        (put(0, 0, 0, None), r"shot 0 of scene 0 \(counting from 0\) is a tuple, expected a pair of tensors"),
        (
            put(0, 1, 1, torch.zeros(2, 1, 2, 1, 4)),
            r"video of shot 1 of scene 0 .* has shape \(2, 1, 2, 1, 4\), expected \(2, 2, 1, 1, 4\)",
        ),
        (
            put(1, 0, 0, torch.zeros(2, 2, 4)),
            r"text of shot 0 of scene 1 .* has shape \(2, 2, 4\), expected \(2, 1, 4\)",
        ),
        (
            put(1, 0, 0, torch.zeros(1, 1, 4)),
            r"text of shot 0 of scene 1 .* has shape \(1, 1, 4\), expected \(2, 1, 4\)",
        ),
        (
            put(1, 0, 1, torch.zeros(2, 1, 1, 1, 5)),
            r"video of shot 0 of scene 1 .* has shape \(2, 1, 1, 1, 5\), expected \(2, 1, 1, 1, 4\)",
        ),
        (put(0, 0, 1, torch.tensor(0.0)), r"video of shot 0 of scene 0 .* has shape \(\), expected"),
        (
            put(1, 0, 0, torch.zeros(2, 1, 4, dtype=torch.bfloat16)),
            r"text of shot 0 of scene 1 .* is torch.bfloat16 on cpu, expected torch.float32 on cpu",
        ),
        (
            put(1, 0, 0, torch.zeros(2, 1, 4, device="meta")),
            r"text of shot 0 of scene 1 .* is torch.float32 on meta, expected torch.float32 on cpu",
        ),
    ],
)
def test_pack_refuses(change, message):
    scenes = make_scenes(LAYOUT, batch=2)
    change(scenes)
    with pytest.raises(ValueError, match=f"^scenes: {message}"):
        pack(scenes, LAYOUT)


@pytest.mark.parametrize("shape", [(2, LAYOUT.tokens + 1, 4), (LAYOUT.tokens,)])
def test_unpack_refuses(shape):
    with pytest.raises(ValueError, match=rf"^row: got shape .*expected \[batch, {LAYOUT.tokens}, \*rest\]"):
        unpack(torch.zeros(shape), LAYOUT)
