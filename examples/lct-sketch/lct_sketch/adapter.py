"""The adapter: where Sketch's blocks are split, and what the engine must know of it."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lct_core import QKV, Backbone, Shot, ShotInput, Site, State, Traits


class SketchBackbone(Backbone):
    """The adapter of ``Sketch``."""

    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.traits = Traits(
            latent_channels=self.model.channels,
            patch=(1, 2, 2),
            text_width=self.model.text_width,
            heads=self.model.heads,
            kv_heads=self.model.heads,
            head_dim=self.model.head_dim,
            text="cross",
            pairing="half",
            timesteps=(0.0, 1.0),
        )

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """All alike."""
        return list(self.model.blocks)

    def sites(self, block: nn.Module) -> Sequence[Site]:
        """Self-attention over the scene, then the text."""
        return (Site("self"), Site("text", "text"))

    def encode(self, inputs: ShotInput, timestep: Tensor) -> State:
        """One stream; the modulation and the text stay as they are."""
        video = self.model.patch_in(inputs.latents).flatten(2).transpose(1, 2)
        modulation = self.model.time_in(timestep[:, None].to(video.dtype))[:, None]
        return State({"video": video}, {"modulation": modulation, "text": inputs.text})

    def rope(self, coords: Tensor) -> Tensor:
        """The model's own angles."""
        return self.model.angles(coords)

    def qkv(self, block: Any, site: Site, state: State) -> QKV:
        """What each attention takes, not rotated."""
        video = state.streams["video"]
        if site.name == "text":
            return QKV(*block.split(block.text_q(video), 1), *block.split(block.text_kv(state.conditioning["text"]), 2))
        shift, scale, gate = state.conditioning["modulation"].chunk(3, dim=-1)
        x = F.layer_norm(video, video.shape[-1:]) * (1 + scale) + shift
        return QKV(*block.split(block.self_qkv(x), 3), gate)

    def finish(self, block: Any, site: Site, state: State, attended: Tensor, aux: Any) -> dict[str, Tensor]:
        """What follows each attention."""
        video, attended = state.streams["video"], attended.flatten(2)
        if site.name == "self":
            return {"video": video + aux * block.self_out(attended)}
        video = video + block.text_out(attended)
        return {"video": video + block.mlp(F.layer_norm(video, video.shape[-1:]))}

    def head(self, state: State) -> Tensor:
        """The final layer."""
        return self.model.out(state.streams["video"])

    def unpatchify(self, tokens: Tensor, shot: Shot) -> Tensor:
        """As the model does."""
        frames, rows, columns = shot.grid
        patches = tokens.view(len(tokens), frames, rows, columns, 2, 2, self.model.channels)
        return patches.permute(0, 6, 1, 2, 4, 3, 5).reshape(len(tokens), -1, frames, 2 * rows, 2 * columns)

    def single_shot(self, inputs: ShotInput, timestep: Tensor) -> Tensor:
        """The model's own forward."""
        return self.model(inputs.latents, timestep, inputs.text)
