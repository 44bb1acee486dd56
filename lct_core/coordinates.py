"""The interleaved 3D coordinates of every token (paper, 3.2.2 and Fig. 3b)."""

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lct_core.layout import Layout, Shot

Scheme = Literal["paper", "anchored"]


def coordinates(layout: Layout, *, scheme: Scheme = "paper") -> Int[Tensor, "tokens 3"]:
    """Where every token of a row stands: ``(frame, height, width)``, in latent patches.

    A scene's shots follow one another along the space diagonal, and every scene starts at 0.

    - ``"paper"`` (default): text token ``i`` of a shot at ``(o+i, o+i, o+i)``, video token ``(t, y, x)`` after the end
      of the text at ``(o+L+t, o+L+y, o+L+x)``, the next shot at ``o + L + max(T, H, W)`` (the max: ours, after M-RoPE).
    - ``"anchored"`` (ours): text at its shot's origin, video at ``(o+t, o+y, o+x)``, the next shot at
      ``o + max(T, H, W)``: the base model's own coordinates, each shot moved as one body.

    Args:
        layout: The row's scenes of shots. The rows of the result follow ``layout.text_first``; the places do not.
        scheme: ``"paper"`` or ``"anchored"``.

    Returns:
        int64, exact.

    Raises:
        ValueError: for an unknown scheme.
    """
    check_scheme(scheme)
    out = torch.empty(layout.tokens, 3, dtype=torch.int64)
    spans = iter(layout.spans)
    for scene in layout.scenes:
        origin = 0
        for shot in scene:
            _place(out[next(spans).slice], shot, scheme, layout.text_first, origin)
            origin += extent(shot, scheme=scheme)
    return out


def shot_coordinates(shot: Shot, *, scheme: Scheme, text_first: bool = True) -> Int[Tensor, "tokens 3"]:
    """The coordinates of one shot's tokens from its own origin: what :func:`coordinates` moves along the diagonal."""
    out = torch.empty(shot.tokens, 3, dtype=torch.int64)
    _place(out, shot, check_scheme(scheme), text_first, 0)
    return out


def extent(shot: Shot, *, scheme: Scheme) -> int:
    """How far along the diagonal a shot's successor starts, in whole diagonal steps."""
    return max(shot.grid) + (shot.text if scheme == "paper" else 0)


def measured_extent(coords: Float[Tensor, "tokens axes"], unit: tuple[float, ...]) -> int:
    """The extent of a shot that stands at its base model's own coordinates.

    One step more than the largest coordinate over all axes of the diagonal, in its units, rounded up. A thousandth of a
    step is taken for the rounding of coordinates (ours): in floating point 3 · 0.1 / 0.1 is more than 3.

    Args:
        coords: The base model's coordinates of the shot's tokens, text included, before any move.
        unit: The coordinates, per axis, that make one diagonal step; 0 on an axis along which it does not go.
    """
    if not len(coords):
        return 0
    axes = [axis for axis, size in enumerate(unit) if size]
    steps = coords.double()[:, axes] / torch.tensor(unit, dtype=torch.float64, device=coords.device)[axes]
    return 1 + int((steps.max() - 1e-3).ceil())


def check_scheme(scheme: Scheme) -> Scheme:
    """Return the scheme, or raise ``ValueError`` for one that does not exist."""
    if scheme not in get_args(Scheme):
        raise ValueError(
            f'scheme: got {scheme!r}, expected "paper" (needs single-shot tuning on a base model whose '
            'text has no RoPE) or "anchored" (exact on any base model)'
        )
    return scheme


def _place(out: Tensor, shot: Shot, scheme: Scheme, text_first: bool, origin: int) -> None:
    """Write one shot's coordinates into ``out``, in place."""
    text, video = out.split([shot.text, shot.video] if text_first else [shot.video, shot.text])[
        :: 1 if text_first else -1
    ]
    if scheme == "paper":
        text.copy_(torch.arange(origin, origin + shot.text)[:, None])
        origin += shot.text
    else:
        text.fill_(origin)
    cells = video.view(*shot.grid, 3)
    for axis, size in enumerate(shot.grid):
        steps = torch.arange(origin, origin + size)
        cells[..., axis] = steps.view([-1 if other == axis else 1 for other in range(3)])
