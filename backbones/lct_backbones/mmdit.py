"""The paper's own architecture, a single-shot video MMDiT (paper, 3.1; Esser et al., arXiv 2403.03206); its adapter.

Text and video have weights of their own in every block and meet in one joint self-attention, text first. Queries and
keys are RMS-normed, 3D RoPE turns those of the video, and the noise level modulates both streams (AdaLN-zero). The
model is an ordinary single-shot DiT: it knows nothing of scenes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from timm.layers import Mlp, RmsNorm
from torch import Tensor, nn
from torch.nn import functional as F

from lct_core import (
    QKV,
    Backbone,
    Rotation,
    Shot,
    ShotInput,
    Site,
    State,
    Traits,
    angles,
    axis_frequencies,
    rotate,
    rotation,
)

#: The size of the paper's model (4, "Training Details": 3B parameters; here 2.98B); its division is ours.
PAPER_3B = {"channels": 16, "text_width": 4096, "width": 2048, "depth": 20, "heads": 16}


class MMDiT(nn.Module):
    """A single-shot text-to-video diffusion transformer of any size.

    Args:
        channels: Latent channels.
        text_width: Channels of the encoded prompt.
        width: Channels of both streams; a multiple of ``heads``, with an even number of channels to a head.
        depth: Number of blocks.
        heads: Attention heads.
        patch: Latent ``(frames, height, width)`` that make one token (default: upstream, no patching in time).
        mlp_ratio: Hidden channels of the MLP over ``width`` (default: upstream).
        theta: Base of the RoPE periods (default: upstream).
        position_embedding: Whether video tokens also get a fixed sine-cosine embedding of their place in their own
            shot, as SD3's do (default: paper, which names RoPE alone). A small model learns faster where things belong.
    """

    def __init__(
        self,
        *,
        channels: int = 16,
        text_width: int = 64,
        width: int = 96,
        depth: int = 4,
        heads: int = 4,
        patch: tuple[int, int, int] = (1, 2, 2),
        mlp_ratio: float = 4.0,
        theta: float = 10_000.0,
        position_embedding: bool = False,
    ) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"width: got {width}, expected a multiple of {2 * heads}: {heads} heads of an even size")
        self.channels, self.text_width, self.heads, self.patch, self.theta = channels, text_width, heads, patch, theta
        self.width, self.head_dim, self.position_embedding = width, width // heads, position_embedding
        tokens = channels * patch[0] * patch[1] * patch[2]
        self.video_in = nn.Linear(tokens, width)
        self.text_in = nn.Linear(text_width, width)
        self.time_in = Mlp(256, hidden_features=width, out_features=width, act_layer=nn.SiLU)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, last=i == depth - 1) for i in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 2 * width)
        self.video_out = nn.Linear(width, tokens)
        self._initialize()

    def forward(
        self,
        latents: Float[Tensor, "batch channels frames height width"],
        timestep: Float[Tensor, " batch"],
        text: Float[Tensor, "batch tokens text_width"],
    ) -> Float[Tensor, "batch channels frames height width"]:
        """The velocity of one shot (Eq. 1) at a timestep between 0, clean, and 1000, noise."""
        text, video, condition = self.embed(latents, timestep, text)
        grid = self.grid(latents)
        cells = _cells(grid, latents.device)
        coords = torch.cat([cells.new_zeros(text.shape[1], 3), cells])
        by = rotation(self.angles(coords), pairing="interleaved")
        for block in self.blocks:
            text, video = block(text, video, condition, by)
        return self.unpatchify(self.head(video, condition), grid)

    def embed(
        self, latents: Tensor, timestep: Tensor, text: Tensor
    ) -> tuple[Float[Tensor, "batch text width"], Float[Tensor, "batch video width"], Float[Tensor, "batch 1 width"]]:
        """Text tokens, video tokens and the conditioning of a noise level."""
        t, h, w = self.patch
        patches = rearrange(latents, "b c (f t) (y h) (x w) -> b (f y x) (c t h w)", t=t, h=h, w=w)
        frequencies = torch.logspace(0, -4, 129, dtype=torch.float64, device=timestep.device)[:-1]
        phases = timestep[:, None].double() * frequencies
        waves = torch.cat([phases.cos(), phases.sin()], dim=-1).to(self.video_in.weight.dtype)
        video = self.video_in(patches)
        if self.position_embedding:
            places = self._axis_angles(_cells(self.grid(latents), latents.device), self.width)
            video = video + torch.cat([places.cos(), places.sin()], dim=-1).flatten(1).to(video.dtype)
        return self.text_in(text), video, F.silu(self.time_in(waves))[:, None]

    def grid(self, latents: Tensor) -> list[int]:
        """Frames, rows and columns of tokens that latents make."""
        return [size // patch for size, patch in zip(latents.shape[2:], self.patch, strict=True)]

    def angles(self, coords: Float[Tensor, "tokens 3"]) -> Float[Tensor, "tokens 1 pairs"]:
        """RoPE angles, float64."""
        return self._axis_angles(coords, self.head_dim)

    def _axis_angles(self, coords: Tensor, channels: int) -> Float[Tensor, "tokens 1 pairs"]:
        """Channels are shared out evenly among frames, height and width, two for each angle."""
        side = 2 * (channels // 6)
        return angles(coords, axis_frequencies((channels - 2 * side, side, side), theta=self.theta))

    def head(self, video: Tensor, condition: Tensor) -> Float[Tensor, "batch video patch"]:
        """The final layer."""
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        return self.video_out(_modulate(self.norm(video), shift, scale))

    def unpatchify(self, tokens: Tensor, grid: Sequence[int]) -> Float[Tensor, "batch channels frames height width"]:
        """Tokens back to the shape of the latents."""
        (f, y, x), (t, h, w) = grid, self.patch
        return rearrange(tokens, "b (f y x) (c t h w) -> b c (f t) (y h) (x w)", f=f, y=y, x=x, t=t, h=h, w=w)

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        streams = [module for module in self.modules() if isinstance(module, Stream)]
        for gate in (self.modulation, self.video_out, *(stream.modulation for stream in streams)):
            nn.init.zeros_(gate.weight)  # AdaLN-zero: every block starts as the identity


class Block(nn.Module):
    """Two streams that meet in one attention."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, *, last: bool) -> None:
        super().__init__()
        self.text = Stream(width, heads, mlp_ratio, read_only=last)  # nobody reads the text after the last block
        self.video = Stream(width, heads, mlp_ratio)

    def forward(self, text: Tensor, video: Tensor, condition: Tensor, by: Rotation) -> tuple[Tensor, Tensor]:
        """One block of one shot."""
        q, k, v, modulations = self.qkv(text, video, condition)
        q, k, v = (x.transpose(1, 2) for x in (rotate(q, by), rotate(k, by), v))
        return self.finish(text, video, F.scaled_dot_product_attention(q, k, v).transpose(1, 2), modulations)

    def qkv(self, text: Tensor, video: Tensor, condition: Tensor) -> QKV:
        """Joint queries, keys and values, text first, not rotated; and both streams' modulations."""
        (*of_text, text_modulation), (*of_video, video_modulation) = (
            self.text.qkv(text, condition),
            self.video.qkv(video, condition),
        )
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(of_text, of_video, strict=True))
        return QKV(q, k, v, (text_modulation, video_modulation))

    def finish(
        self, text: Tensor, video: Tensor, attended: Tensor, modulations: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Both streams after the attention."""
        of_text, of_video = attended.flatten(2).split([text.shape[1], video.shape[1]], dim=1)
        return self.text.finish(text, of_text, modulations[0]), self.video.finish(video, of_video, modulations[1])


class Stream(nn.Module):
    """One modality's weights in a block; a read-only stream is attended to and stays as it is."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, *, read_only: bool = False) -> None:
        super().__init__()
        self.heads, self.read_only = heads, read_only
        self.modulation = nn.Linear(width, (2 if read_only else 6) * width)
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.to_qkv = nn.Linear(width, (2 if read_only else 3) * width)
        self.norm_k = RmsNorm(width // heads)
        if not read_only:
            self.norm_q = RmsNorm(width // heads)
            self.proj = nn.Linear(width, width)
            self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
            self.mlp = Mlp(width, hidden_features=int(width * mlp_ratio), act_layer=nn.GELU)

    def qkv(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normed queries and keys, values, and the modulation that :meth:`finish` needs again."""
        modulation = self.modulation(condition)
        shift, scale = modulation.chunk(2 if self.read_only else 6, dim=-1)[:2]
        *q, k, v = rearrange(
            self.to_qkv(_modulate(self.norm1(x), shift, scale)),
            "b s (n h d) -> n b s h d",
            n=2 if self.read_only else 3,
            h=self.heads,
        )
        exact = self.norm_k.weight.dtype  # under autocast, the norms run in the weights' precision
        k = self.norm_k(k.to(exact))
        if self.read_only:
            return k, k, v, modulation  # nobody reads what its queries see, so it needs none of its own
        return self.norm_q(q[0].to(exact)), k, v, modulation

    def finish(self, x: Tensor, attended: Tensor, modulation: Tensor) -> Tensor:
        """Output projection and MLP, gated by the noise level."""
        if self.read_only:
            return x
        gate, shift, scale, mlp_gate = modulation.chunk(6, dim=-1)[2:]
        x = x + gate * self.proj(attended)
        return x + mlp_gate * self.mlp(_modulate(self.norm2(x), shift, scale))


def tiny() -> MMDiT:
    """A model of 242K weights, none of them zero: for tests and ``lct conformance lct_backbones.mmdit:tiny``."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MMDiT(channels=4, text_width=16, width=48, depth=3, heads=2)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def _cells(grid: Sequence[int], device: torch.device) -> Float[Tensor, "tokens 3"]:
    """Frame, row and column of every video token, float64."""
    return torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64, device=device) for n in grid)).view(-1, 3)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class MMDiTBackbone(Backbone):
    """The adapter: everything stands already in the model, split where the engine needs it."""

    model: MMDiT

    def __init__(self, model: MMDiT) -> None:
        super().__init__(model)
        self.traits = Traits(
            latent_channels=model.channels,
            patch=model.patch,
            text_width=model.text_width,
            heads=model.heads,
            kv_heads=model.heads,
            head_dim=model.head_dim,
            text="joint",
        )

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The dual-stream blocks."""
        return list(self.model.blocks)

    def encode(self, inputs: ShotInput, timestep: Tensor) -> State:
        """Both streams, and the conditioning of the shot's noise level."""
        text, video, condition = self.model.embed(inputs.latents, timestep, inputs.text)
        return State({"text": text, "video": video}, {"condition": condition})

    def rope(self, coords: Tensor) -> Tensor:
        """The model's own angles."""
        return self.model.angles(coords)

    def qkv(self, block: nn.Module, site: Site, state: State) -> QKV:
        """Of both streams, text first."""
        assert isinstance(block, Block)
        return block.qkv(**state.streams, **state.conditioning)

    def finish(self, block: nn.Module, site: Site, state: State, attended: Tensor, aux: Any) -> dict[str, Tensor]:
        """Both streams."""
        assert isinstance(block, Block)
        text, video = block.finish(**state.streams, attended=attended, modulations=aux)
        return {"text": text, "video": video}

    def head(self, state: State) -> Tensor:
        """Of the video stream."""
        return self.model.head(state.streams["video"], state.conditioning["condition"])

    def unpatchify(self, tokens: Tensor, shot: Shot) -> Tensor:
        """As the model does."""
        return self.model.unpatchify(tokens, shot.grid)

    def single_shot(self, inputs: ShotInput, timestep: Tensor) -> Tensor:
        """The model's own forward."""
        return self.model(inputs.latents, timestep, inputs.text)
