"""Sketch, a made-up single-shot video DiT: it knows nothing of scenes, nor of lct-core."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Sketch(nn.Module):
    """Video tokens attend to one another, then to the text; RoPE turns channel i with channel i + 6 of 12."""

    def __init__(self, channels: int = 4, text_width: int = 8, width: int = 24, heads: int = 2, depth: int = 2) -> None:
        super().__init__()
        self.channels, self.text_width, self.heads, self.head_dim = channels, text_width, heads, width // heads
        self.patch_in = nn.Conv3d(channels, width, kernel_size=(1, 2, 2), stride=(1, 2, 2))
        self.time_in = nn.Linear(1, 3 * width)
        self.blocks = nn.ModuleList(Block(width, text_width, heads) for _ in range(depth))
        self.out = nn.Linear(width, 4 * channels)

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """The velocity of one shot at a timestep between 0, clean, and 1, noise."""
        batch, _, frames, height, width = latents.shape
        grid = (frames, height // 2, width // 2)
        video = self.patch_in(latents).flatten(2).transpose(1, 2)
        modulation = self.time_in(timestep[:, None].to(video.dtype))[:, None]
        angles = self.angles(torch.cartesian_prod(*(torch.arange(n, device=latents.device) for n in grid)).view(-1, 3))
        for block in self.blocks:
            video = block(video, modulation, text, angles)
        patches = self.out(video).view(batch, *grid, 2, 2, self.channels)
        return patches.permute(0, 6, 1, 2, 4, 3, 5).reshape(latents.shape)

    def angles(self, places: Tensor) -> Tensor:
        """Radians, ``[tokens, 1, 6]``: two of the six for each of frame, row and column."""
        return (places.double()[..., None] * torch.tensor([1.0, 0.1], dtype=torch.float64)).flatten(1)[:, None]


class Block(nn.Module):
    """Self-attention, then cross-attention, each with its projections, then an MLP."""

    def __init__(self, width: int, text_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.self_qkv, self.self_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.text_q, self.text_kv = nn.Linear(width, width), nn.Linear(text_width, 2 * width)
        self.text_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, video: Tensor, modulation: Tensor, text: Tensor, angles: Tensor) -> Tensor:
        """One block of one shot."""
        shift, scale, gate = modulation.chunk(3, dim=-1)
        x = F.layer_norm(video, video.shape[-1:]) * (1 + scale) + shift
        q, k, v = self.split(self.self_qkv(x), 3)
        video = video + gate * self.self_out(attention(turn(q, angles), turn(k, angles), v).flatten(2))
        (q,), (k, v) = self.split(self.text_q(video), 1), self.split(self.text_kv(text), 2)
        video = video + self.text_out(attention(q, k, v).flatten(2))
        return video + self.mlp(F.layer_norm(video, video.shape[-1:]))

    def split(self, x: Tensor, parts: int) -> list[Tensor]:
        """``[batch, tokens, parts x width]`` as parts of ``[batch, tokens, heads, head_dim]``."""
        return [part.unflatten(-1, (self.heads, -1)) for part in x.chunk(parts, dim=-1)]


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary position embedding."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos().float(), angles.sin().float()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of ``[batch, tokens, heads, head_dim]``."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def tiny() -> Sketch:
    """A small model, the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Sketch()
