"""Models of every kind that the MMDiT is not. Their own forward is plain torch: it shares no code with the library."""

import torch
from torch import nn
from torch.nn import functional as F

from lct_core import QKV, Backbone, Extra, Site, State, Traits


class Toy(nn.Module):
    """A single-stream, single-shot DiT.

    Args:
        text: Whether text is joined to self-attention or cross-attended.
        text_first: Whether it comes first there.
        pairing: How RoPE pairs the first channels of a head; None for no RoPE.
        pairs: How many pairs it turns.
        head_dim: Channels of a head.
        kv_heads: Key and value heads, for four query heads.
        cell: Coordinates of a step along each axis of the grid.
        second: A second attention of every block: "own_shot"; "text", across to the words; "video", among the video
            tokens alone; None for no such attention.
        depth: Number of blocks.
        angle_dtype: Precision of the angles.
    """

    def __init__(
        self,
        *,
        text="joint",
        text_first=True,
        pairing="interleaved",
        pairs=3,
        head_dim=8,
        kv_heads=4,
        cell=(1.0, 1.0, 1.0),
        unit=(1.0, 1.0, 1.0),
        second=None,
        depth=2,
        angle_dtype=torch.float64,
    ):
        super().__init__()
        self.text, self.text_first, self.pairing, self.pairs, self.kv_heads = text, text_first, pairing, pairs, kv_heads
        self.cell, self.unit, self.second, self.angle_dtype, self.head_dim = cell, unit, second, angle_dtype, head_dim
        width = 4 * head_dim
        self.video_in, self.text_in, self.time_in = nn.Linear(12, width), nn.Linear(5, width), nn.Linear(1, width)
        self.blocks = nn.ModuleList(ToyBlock(head_dim, kv_heads, second, text_first) for _ in range(depth))
        self.video_out = nn.Linear(width, 12)

    def forward(self, latents, timestep, text, strength=None):
        x, words, condition = self.embed(latents, timestep, text, strength)
        grid = self.grid(latents)
        angles = self.angles(self.places(grid, text.shape[1] if self.text == "joint" else 0))
        for block in self.blocks:
            q, k, v = block.qkv(x, condition)
            x = block.finish(x, plain_attention(turned(q, angles, self.pairing), turned(k, angles, self.pairing), v))
            if self.second is not None:
                q, k, v = block.second_qkv(x, words, condition)
                if self.second != "text":
                    here = block.video_of(angles, words, dim=0) if self.second == "video" else angles
                    q, k = turned(q, here, self.pairing), turned(k, here, self.pairing)
                x = block.second_finish(x, words, plain_attention(q, k, v))
        return self.unpatchify(self.head(x, words), grid)

    def embed(self, latents, timestep, text, strength=None):
        batch, channels = latents.shape[:2]
        frames, height, width = self.grid(latents)
        video = latents.reshape(batch, channels, frames, height, 2, width, 2).permute(0, 2, 3, 5, 1, 4, 6).flatten(1, 3)
        video, words = self.video_in(video.flatten(2)), self.text_in(text)
        time = self.time_in(timestep[:, None].to(latents.dtype))
        condition = F.silu(time if strength is None else time * strength[:, None])[:, None]
        if self.text == "cross":
            return video, words, condition
        return torch.cat([words, video] if self.text_first else [video, words], dim=1), words, condition

    def grid(self, latents):
        frames, height, width = latents.shape[2:]
        return frames, height // 2, width // 2

    def places(self, grid, words):
        cells = [(f, y, x) for f in range(grid[0]) for y in range(grid[1]) for x in range(grid[2])]
        video = torch.tensor(cells, dtype=torch.float64).reshape(-1, 3) * torch.tensor(self.cell, dtype=torch.float64)
        text = torch.zeros(words, 3, dtype=torch.float64)
        return torch.cat([text, video] if self.text_first else [video, text])

    def angles(self, coords):
        mixed = torch.tensor([[1.0, 0.31, 0.11], [0.23, 0.83, 0.05], [0.13, 0.41, 0.61]])  # every axis, every pair
        more = torch.cat([mixed * 0.7**i for i in range(self.pairs // 3)], dim=1)
        return (coords.to(self.angle_dtype) @ more.to(self.angle_dtype))[:, None]

    def head(self, x, words):
        if self.text == "joint":
            x = x[:, words.shape[1] :] if self.text_first else x[:, : x.shape[1] - words.shape[1]]
        return self.video_out(F.layer_norm(x, x.shape[-1:]))

    def unpatchify(self, tokens, grid):
        x = tokens.reshape(len(tokens), *grid, 3, 2, 2).permute(0, 4, 1, 2, 5, 3, 6)
        return x.reshape(len(tokens), 3, grid[0], 2 * grid[1], 2 * grid[2])


class ToyBlock(nn.Module):
    def __init__(self, head_dim, kv_heads, second, text_first):
        super().__init__()
        width, narrow = 4 * head_dim, kv_heads * head_dim
        self.head_dim, self.second, self.text_first = head_dim, second, text_first
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, narrow), nn.Linear(width, narrow)
        self.out, self.mlp = (
            nn.Linear(width, width),
            nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width)),
        )
        if second is not None:
            self.q2, self.k2, self.v2 = nn.Linear(width, width), nn.Linear(width, narrow), nn.Linear(width, narrow)
            self.out2 = nn.Linear(width, width)

    def qkv(self, x, condition):
        h = F.layer_norm(x, x.shape[-1:]) * (1 + condition) + condition
        return [y.unflatten(-1, (-1, self.head_dim)) for y in (self.q(h), self.k(h), self.v(h))]

    def finish(self, x, attended):
        x = x + self.out(attended.flatten(2))
        return x + self.mlp(F.layer_norm(x, x.shape[-1:]))

    def second_qkv(self, x, words, condition):
        h = F.layer_norm(x, x.shape[-1:]) - condition
        h = self.video_of(h, words, dim=1) if self.second == "video" else h
        seen = words if self.second == "text" else h
        return [y.unflatten(-1, (-1, self.head_dim)) for y in (self.q2(h), self.k2(seen), self.v2(seen))]

    def second_finish(self, x, words, attended):
        change = self.out2(attended.flatten(2))
        if self.second == "video":
            left = x.new_zeros(words.shape)
            change = torch.cat([left, change] if self.text_first else [change, left], dim=1)
        return x + change

    def video_of(self, x, words, *, dim):
        """The video tokens, where text is among the tokens."""
        text, tokens = words.shape[1], x.shape[dim]
        return x.narrow(dim, text if self.text_first else 0, tokens - text)


def turned(x, angles, pairing):
    if pairing is None:
        return x
    pairs = angles.shape[-1]
    third = pairs // 3
    first = {
        "interleaved": [2 * i for i in range(pairs)],
        "half": list(range(pairs)),
        "half_per_axis": [2 * third * axis + i for axis in range(3) for i in range(third)],
    }[pairing]
    second = [i + {"interleaved": 1, "half": pairs, "half_per_axis": third}[pairing] for i in first]
    cos, sin = angles.cos().float(), angles.sin().float()
    a, b, out = x[..., first].float(), x[..., second].float(), x.clone()
    out[..., first], out[..., second] = (a * cos - b * sin).to(x.dtype), (a * sin + b * cos).to(x.dtype)
    return out


def plain_attention(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


class ToyBackbone(Backbone):
    """The adapter of a toy; ``scope`` is which prompts the tests let its shots see."""

    def __init__(self, model, *, scope="own"):
        super().__init__(model)
        self.scope = scope
        self.traits = Traits(
            latent_channels=3,
            patch=(1, 2, 2),
            text_width=5,
            heads=4,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            text=model.text,
            text_first=model.text_first,
            pairing=model.pairing,
            unit=model.unit,
            timesteps=(1.0, 0.0),
            extras={"strength": Extra(())},
        )

    @property
    def blocks(self):
        return list(self.model.blocks)

    def sites(self, block):
        second = {
            "own_shot": Site("second", "own_shot"),
            "text": Site("second", "text"),
            "video": Site("second", "joined", tokens="video"),
        }
        return (Site("self"),) if self.model.second is None else (Site("self"), second[self.model.second])

    def coordinates(self, inputs, shot):
        return self.model.places(shot.grid, shot.text)

    def encode(self, inputs, timestep):
        x, words, condition = self.model.embed(inputs.latents, timestep, inputs.text, inputs.extras.get("strength"))
        return State({"x": x}, {"words": words, "condition": condition})

    def rope(self, coords):
        return self.model.angles(coords)

    def qkv(self, block, site, state):
        if site.name == "self":
            return QKV(*block.qkv(state.streams["x"], state.conditioning["condition"]))
        return QKV(*block.second_qkv(state.streams["x"], **state.conditioning))

    def finish(self, block, site, state, attended, aux):
        x = state.streams["x"]
        if site.name == "self":
            return {"x": block.finish(x, attended)}
        return {"x": block.second_finish(x, state.conditioning["words"], attended)}

    def head(self, state):
        return self.model.head(state.streams["x"], state.conditioning["words"])

    def unpatchify(self, tokens, shot):
        return self.model.unpatchify(tokens, shot.grid)

    def single_shot(self, inputs, timestep):
        return self.model(inputs.latents, timestep, inputs.text, **inputs.extras)


CROSS = {"text": "cross", "second": "text"}
TOYS = {
    "video first, channels paired half by half": {"text_first": False, "pairing": "half"},
    "channels paired half by half within every axis": {"pairing": "half_per_axis", "pairs": 6, "head_dim": 16},
    "grouped heads, fractional coordinates": {"kv_heads": 2, "cell": (0.4, 1.5, 0.75), "unit": (0.5, 1.5, 0.75)},
    "no RoPE": {"pairing": None},
    "cross-attention to the own text": {**CROSS, "text_first": False},
    "cross-attention to own and global text": {**CROSS, "kv_heads": 1, "scope": "own_and_global"},
    "cross-attention to all text seen": {**CROSS, "pairing": "half", "scope": "all"},
    "a second attention in the own shot": {"second": "own_shot", "kv_heads": 2, "pairing": "half"},
    "a second attention among video tokens": {"second": "video", "kv_heads": 2},
    "the same with video first, fractional coordinates": {
        "second": "video",
        "text_first": False,
        "cell": (0.4, 1.5, 0.75),
        "unit": (0.5, 1.5, 0.75),
    },
}


def toy(*, scope="own", **config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ToyBackbone(Toy(**config), scope=scope)
