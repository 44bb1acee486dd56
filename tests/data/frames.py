"""Frames that the tests of videos and images share."""

import torch


def flat(colours: torch.Tensor, *, height: int = 32, width: int = 48) -> torch.Tensor:
    """One frame per colour: [frames, 3] to [3, frames, height, width]."""
    return colours.T[..., None, None].expand(-1, -1, height, width)


def grey_levels(count: int) -> torch.Tensor:
    return flat(torch.linspace(0.1, 0.9, count)[:, None].expand(-1, 3))
