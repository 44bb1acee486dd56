"""Fixtures that the tests of this folder share."""

import pytest
import torch
from PIL import Image


@pytest.fixture
def gradient() -> torch.Tensor:
    across = torch.linspace(0, 1, 96).expand(64, -1)
    down = torch.linspace(0, 1, 64)[:, None].expand(-1, 96)
    return torch.stack([across, down, 1 - across])[:, None].expand(-1, 3, -1, -1)


@pytest.fixture
def picture(gradient: torch.Tensor) -> Image.Image:
    return Image.fromarray((gradient[:, 0] * 255).byte().permute(1, 2, 0).numpy())
