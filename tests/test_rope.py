import pytest
import torch
from hypothesis import given, strategies as st

from lct_core.rope import angles, axis_frequencies, move, rotate, rotation
from lct_core.testing.tolerances import BOUNDS, error

PAIRINGS = ("interleaved", "half", "half_per_axis")
DIMS = (4, 8, 6)  # 18 channels, 9 pairs
FREQUENCIES = axis_frequencies(DIMS)
pairings = st.sampled_from(PAIRINGS)
seeds = st.integers(0, 2**31)
steps = st.integers(-10_000, 10_000)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def places(tokens, seed=0, far=1000):
    return torch.randint(0, far, (tokens, 3), generator=torch.Generator().manual_seed(seed))


def turned(x, coords, pairing, dtype=torch.float64):
    return rotate(x, rotation(angles(coords, FREQUENCIES), pairing=pairing, dtype=dtype))


def by_complex_numbers(x, theta, pairing):
    """One channel pair after the other, as one complex number, times exp(i theta); in float64."""
    pairs, out = theta.shape[-1], x.double().clone()
    third = pairs // 3
    for i in range(pairs):
        a, b = {
            "interleaved": (2 * i, 2 * i + 1),
            "half": (i, i + pairs),
            "half_per_axis": (i + i // third * third, i + i // third * third + third),
        }[pairing]
        number = torch.complex(x[..., a].double(), x[..., b].double()) * torch.exp(1j * theta[..., i].double())
        out[..., a], out[..., b] = number.real, number.imag
    return out


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("heads", [1, 3])
def test_rotation_is_complex_multiplication(pairing, heads):
    x, theta = draw(2, 5, 3, 18), 100 * draw(5, heads, 9, seed=1)
    got = rotate(x, rotation(theta, pairing=pairing, dtype=torch.float64))
    torch.testing.assert_close(got, by_complex_numbers(x, theta, pairing), rtol=0, atol=1e-14)


def test_a_quarter_turn_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])[None, None, None]
    quarter = torch.full((1, 1, 2), torch.pi / 2, dtype=torch.float64)
    for pairing, expected in (("interleaved", [-2.0, 1.0, -4.0, 3.0]), ("half", [-3.0, -4.0, 1.0, 2.0])):
        got = rotate(x, rotation(quarter, pairing=pairing))
        torch.testing.assert_close(got.flatten(), torch.tensor(expected))


@pytest.mark.parametrize("heads", [1, 3])
def test_half_per_axis_turns_every_axis_like_a_head_of_its_own(heads):
    x, theta = draw(2, 5, 3, 18), 100 * draw(5, heads, 9, seed=1)
    got = rotate(x, rotation(theta, pairing="half_per_axis", dtype=torch.float64))
    axes = zip(x.chunk(3, dim=-1), theta.chunk(3, dim=-1), strict=True)
    apart = [rotate(part, rotation(turn, pairing="half", dtype=torch.float64)) for part, turn in axes]
    assert torch.equal(got, torch.cat(apart, dim=-1))


@given(seeds, pairings)
def test_norms_are_preserved(seed, pairing):
    x = draw(1, 4, 2, 18, seed=seed)
    got = turned(x, places(4, seed), pairing)
    torch.testing.assert_close(got.norm(dim=-1), x.norm(dim=-1), rtol=1e-14, atol=0)


@given(seeds, pairings)
def test_the_inverse_turns_by_the_negated_angles(seed, pairing):
    x, theta = draw(1, 4, 2, 18, seed=seed), angles(places(4, seed), FREQUENCIES)
    there = rotate(x, rotation(theta, pairing=pairing, dtype=torch.float64))
    back = rotate(there, rotation(-theta, pairing=pairing, dtype=torch.float64))
    torch.testing.assert_close(back, x, rtol=0, atol=1e-14)
    assert not torch.allclose(there, x)


@given(seeds, pairings, st.tuples(steps, steps, steps))
def test_scores_depend_only_on_differences_of_coordinates(seed, pairing, shift):
    q, k = draw(1, 5, 1, 18, seed=seed)[0, :, 0], draw(1, 5, 1, 18, seed=seed + 1)[0, :, 0]
    coords = places(5, seed)

    def scores(coords, dtype):
        at_q, at_k = (turned(x[None, :, None].to(dtype), coords, pairing, dtype)[0, :, 0] for x in (q, k))
        return (at_q.double() @ at_k.double().T) / (q.norm(dim=-1)[:, None] * k.norm(dim=-1))

    moved = coords + torch.tensor(shift)
    assert (scores(moved, torch.float64) - scores(coords, torch.float64)).abs().max() <= 1e-11
    bound = BOUNDS[torch.float32]["shifted"].given(0.0)
    assert (scores(moved, torch.float32) - scores(coords, torch.float64)).abs().max() <= bound


@given(seeds, pairings)
def test_scores_tell_other_differences_apart(seed, pairing):
    # else the invariance above would also hold for no rotation at all
    q = draw(1, 1, 1, 18, seed=seed)
    coords = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])
    at = turned(q.expand(1, 5, 1, 18), coords, pairing)[0, :, 0]
    scores = (at @ at[0]).tolist()
    assert all(score < scores[0] for score in scores[1:])
    assert len({round(score, 9) for score in scores}) == 5


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_partial_rotary_leaves_the_rest(pairing, dtype):
    x, theta = draw(2, 4, 3, 23, dtype=dtype), angles(places(4), FREQUENCIES)
    by = rotation(theta, pairing=pairing, dtype=torch.float64)
    got = rotate(x, by)
    assert got.shape == x.shape
    assert torch.equal(got[..., 18:], x[..., 18:])
    assert torch.equal(got[..., :18], rotate(x[..., :18].contiguous(), by))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("distance", [1, 37, 1_000, 10_000, -10_000, 12_345.5])
def test_moving_equals_rotating_at_the_moved_coordinates(distance, pairing, dtype):
    x, coords = draw(2, 64, 3, 18, dtype=dtype), places(64)
    written = turned(x, coords, pairing, torch.float32)
    diagonal = angles(torch.ones(1, 3), FREQUENCIES)[0]
    moved = move(written, distance, diagonal=diagonal, pairing=pairing)
    assert moved.dtype == dtype
    bound = BOUNDS[dtype]["moved keys"].given(0.0)
    truth = turned(x.double(), coords + distance, pairing)
    at_once = turned(x, coords + distance, pairing, torch.float32)
    assert error(moved, truth) <= bound + error(at_once, truth)  # what one extra rounding adds, and no more
    exact = by_complex_numbers(written, (distance * diagonal)[None], pairing)
    assert error(moved, exact) <= bound
    assert error(written, truth) > 0.1  # there is something to prove


@given(seeds, pairings, steps, st.sampled_from([(1.0, 1.0, 1.0), (0.25, 2.0, 2.0)]))
def test_moves_in_the_adapters_own_units_and_back(seed, pairing, distance, unit):
    x, coords, unit = draw(1, 4, 2, 18, seed=seed), places(4, seed), torch.tensor(unit, dtype=torch.float64)
    written = turned(x, coords, pairing)
    diagonal = angles(unit[None], FREQUENCIES)[0]
    moved = move(written, distance, diagonal=diagonal, pairing=pairing)
    torch.testing.assert_close(moved, turned(x, coords + distance * unit, pairing), rtol=0, atol=1e-10)
    back = move(moved, -distance, diagonal=diagonal, pairing=pairing)
    torch.testing.assert_close(back, written, rtol=0, atol=1e-10)


def test_no_move_changes_no_bit():
    x = draw(1, 8, 2, 18, dtype=torch.bfloat16)
    assert torch.equal(move(x, 0, diagonal=angles(torch.ones(1, 3), FREQUENCIES)[0], pairing="half"), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_move_errs_less_than_many(dtype):
    x, coords = draw(1, 64, 2, 18, dtype=dtype), places(64)
    diagonal = angles(torch.ones(1, 3), FREQUENCIES)[0]
    written = step_by_step = turned(x, coords, "half", torch.float32)
    for _ in range(50):
        step_by_step = move(step_by_step, 7, diagonal=diagonal, pairing="half")
    truth = turned(x.double(), coords + 350, "half")
    at_once = error(move(written, 350, diagonal=diagonal, pairing="half"), truth)
    assert 2 * at_once < error(step_by_step, truth)


def test_heads_may_have_their_own_angles():
    x, theta = draw(1, 4, 3, 18), draw(4, 3, 9, seed=1)
    got = rotate(x, rotation(theta, pairing="half", dtype=torch.float64))
    for head in range(3):
        alone = rotate(x[:, :, [head]], rotation(theta[:, [head]], pairing="half", dtype=torch.float64))
        assert torch.equal(got[:, :, [head]], alone)
    diagonal = draw(3, 9, seed=2)
    moved = move(got, 5, diagonal=diagonal, pairing="half")
    expected = rotate(x, rotation(theta + 5 * diagonal, pairing="half", dtype=torch.float64))
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-12)


@given(st.lists(st.sampled_from([0, 2, 4, 6]), min_size=1, max_size=3).filter(any), seeds)
def test_angles_are_float64_and_separable_per_axis(dims, seed):
    coords = torch.randint(-(10**6), 10**6, (5, len(dims)), generator=torch.Generator().manual_seed(seed))
    frequencies = axis_frequencies(dims, theta=256.0)
    got = angles(coords, frequencies)
    assert (got.dtype, got.shape) == (torch.float64, (5, 1, sum(dims) // 2))
    pair = 0
    for axis, channels in enumerate(dims):
        for i in range(channels // 2):
            expected = coords[:, axis].double() * 256.0 ** (-2 * i / channels)
            torch.testing.assert_close(got[:, 0, pair], expected, rtol=1e-14, atol=0)
            assert frequencies[:, pair].count_nonzero() == 1
            pair += 1


def test_theta_is_ten_thousand():
    expected = torch.tensor([[1.0, 0.1, 0.01, 0.001]], dtype=torch.float64)
    assert torch.equal(axis_frequencies((8,)), axis_frequencies((8,), theta=10_000.0))
    torch.testing.assert_close(axis_frequencies((8,)), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("of_coords", [torch.int64, torch.float32, torch.float64])
def test_angles_are_computed_in_the_dtype_of_the_frequencies(dtype, of_coords):
    """As a model does whose own angles are float32: coordinate times frequency, one rounding."""
    coords, frequencies = places(6).to(of_coords), axis_frequencies(DIMS, dtype=dtype)
    got = angles(coords, frequencies)
    assert got.dtype == frequencies.dtype == dtype
    axis = frequencies.count_nonzero(dim=1).cumsum(0)
    for pair in range(frequencies.shape[1]):
        own = int((axis <= pair).sum())
        assert torch.equal(got[:, 0, pair], coords[:, own].to(dtype) * frequencies[own, pair])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cosines_are_cast_once(dtype):
    theta = angles(places(6, far=10**6), FREQUENCIES)
    by = rotation(theta, pairing="half", dtype=dtype)
    assert torch.equal(by.cos, theta.cos().to(dtype))
    assert torch.equal(by.sin, theta.sin().to(dtype))
    assert by.pairing == "half"


def test_rotations_are_float32_unless_asked_otherwise():
    assert rotation(torch.zeros(1, 1, 1, dtype=torch.float64), pairing="half").cos.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_half_precision_rotates_in_float32(dtype, pairing):
    x, by = draw(1, 32, 2, 18, dtype=dtype), rotation(angles(places(32), FREQUENCIES), pairing=pairing)
    got = rotate(x, by)
    assert got.dtype == dtype
    assert torch.equal(got, rotate(x.float(), by).to(dtype))
    assert not torch.equal(got, rotate(x, by._replace(cos=by.cos.to(dtype), sin=by.sin.to(dtype))))


def test_the_finer_of_the_two_precisions_decides():
    x, theta = draw(1, 4, 2, 18), angles(places(4), FREQUENCIES)
    coarse, fine = (rotation(theta, pairing="half", dtype=d) for d in (torch.float32, torch.float64))
    assert rotate(x, coarse).dtype == torch.float64
    assert torch.equal(rotate(x.float(), fine), rotate(x.float().double(), fine).float())


def test_autocast_does_not_reach_a_rotation():
    x, by = draw(1, 4, 2, 18, dtype=torch.float32), rotation(angles(places(4), FREQUENCIES), pairing="half")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rotate(x, by), rotate(x.clone(), by))
        assert rotate(x, by).dtype == torch.float32


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_gradients_turn_back(pairing):
    x, gradient = draw(1, 4, 2, 22).requires_grad_(), draw(1, 4, 2, 22, seed=1)
    theta = angles(places(4), FREQUENCIES)
    rotate(x, rotation(theta, pairing=pairing, dtype=torch.float64)).backward(gradient)
    back = rotate(gradient, rotation(-theta, pairing=pairing, dtype=torch.float64))
    torch.testing.assert_close(x.grad, back, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dims", [(3,), (2, 5), (-2, 4)])
def test_odd_or_negative_channels_are_an_error(dims):
    with pytest.raises(ValueError, match=r"^dims: got \(.*\), expected even numbers"):
        axis_frequencies(dims)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairing": "neox"}, r"^pairing: got 'neox', expected one of \('interleaved', 'half', 'half_per_axis'\)"),
        ({"pairing": "half", "dtype": torch.bfloat16}, r"^dtype: got torch.bfloat16, expected torch.float32"),
        ({"pairing": "half", "dtype": torch.float16}, r"^dtype: got torch.float16, expected torch.float32"),
    ],
)
def test_rotation_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        rotation(torch.zeros(1, 1, 2, dtype=torch.float64), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotation_refuses_angles_in_half_precision(dtype):
    with pytest.raises(ValueError, match=rf"^angles: got {dtype}, expected torch.float32 or torch.float64"):
        rotation(torch.zeros(1, 1, 2, dtype=dtype), pairing="half")


def test_a_rotation_wider_than_a_head_is_an_error():
    with pytest.raises(ValueError, match=r"^by: the rotation turns 18 channels, but the heads of x have 12"):
        turned(draw(1, 4, 2, 12), places(4), "half")
