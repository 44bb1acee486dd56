"""The protocol of an adapter: how the engine runs a single-shot DiT block by block.

An adapter splits every block, per shot, around its attention: :meth:`Backbone.qkv` before it, :meth:`Backbone.finish`
after. Everything between is the engine's (:mod:`lct_core.engine`): coordinates, rotation, joining, plan and cache.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lct_core._describe import describe
from lct_core.backbone.inputs import ShotInput
from lct_core.backbone.traits import Extra, Traits, check_extras, check_inputs
from lct_core.coordinates import shot_coordinates
from lct_core.layout import Shot
from lct_core.rope import Rotation, rotate, rotation

Joint = Literal["joined", "own_shot", "text"]
Tokens = Literal["all", "video"]

_ANY_SIZE = 5  # size used for unconstrained axes in random inputs


@dataclass
class State:
    """One shot on its way through the blocks.

    Args:
        streams: What blocks change, by name: ``[batch, tokens, width]`` each.
        conditioning: What stays: the modulation of this shot's noise level, ``[batch, ...]`` each.
    """

    streams: dict[str, Tensor]
    conditioning: dict[str, Tensor] = field(default_factory=dict)


class Site(NamedTuple):
    """One attention of a block.

    Args:
        name: What the adapter calls it.
        joint: What its queries see: ``"joined"``, the shots of the scene that the pattern allows; ``"own_shot"``; or
            ``"text"``, cross-attention to the prompts that the scene model's ``text`` allows.
        tokens: Which tokens of a shot take part where text is part of self-attention: ``"all"`` or ``"video"``.
    """

    name: str
    joint: Joint = "joined"
    tokens: Tokens = "all"


class QKV(NamedTuple):
    """Queries, keys and values of one site, ``[batch, tokens, heads, head_dim]``: normed, modulated, not rotated.

    ``aux`` is whatever :meth:`Backbone.finish` needs again: anything made of tensors, tuples and lists.
    """

    q: Float[Tensor, "batch queries heads head_dim"]
    k: Float[Tensor, "batch keys kv_heads head_dim"]
    v: Float[Tensor, "batch keys kv_heads head_dim"]
    aux: Any = None


class Backbone(ABC):
    """The adapter of one DiT family. Every method handles one shot and knows nothing of the others.

    Args:
        model: The single-shot model; its weights, ``state_dict`` and forward stay as they are.
    """

    traits: Traits

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks, in order; each is called through its ``__call__``, so hooks fire."""

    def refusals(self) -> list[str]:
        """Every reason why the model cannot be served as it is set up now; empty where it can. Cheap: every call asks.

        For features of a model's library that would be passed over in silence, such as a cache of its own.
        """
        return []

    def cast(self, dtype: torch.dtype) -> None:
        """Bring the model to a dtype as its own loader does; override where that leaves some weights in float32."""
        self.model.to(dtype)

    @abstractmethod
    def encode(self, inputs: ShotInput, timestep: Float[Tensor, " batch"]) -> State:
        """Embed one shot: latents to video tokens, text to text tokens, the model's own timestep to modulation."""

    @abstractmethod
    def qkv(self, block: nn.Module, site: Site, state: State) -> QKV:
        """Queries, keys and values of one site, text and video joined in the model's own order."""

    @abstractmethod
    def finish(self, block: nn.Module, site: Site, state: State, attended: Tensor, aux: Any) -> dict[str, Tensor]:
        """The rest of the block up to its next site: output projection, gates, MLP. Returns the streams that changed.

        ``attended`` is ``[batch, queries, heads, head_dim]``.
        """

    @abstractmethod
    def head(self, state: State) -> Tensor:
        """The final layer, per video token."""

    @abstractmethod
    def unpatchify(self, tokens: Tensor, shot: Shot) -> Float[Tensor, "batch channels frames height width"]:
        """The head's tokens as a prediction in the shape of the latents."""

    @abstractmethod
    def single_shot(self, inputs: ShotInput, timestep: Float[Tensor, " batch"]) -> Tensor:
        """The model's own, untouched forward on one shot: what a one-shot scene must equal."""

    def sites(self, block: nn.Module) -> Sequence[Site]:
        """The attentions of a block, in order (default: one self-attention over the joined shots)."""
        return (Site("self"),)

    def rope(self, coords: Float[Tensor, "tokens axes"]) -> Float[Tensor, "tokens heads pairs"]:
        """The angles, in radians and in the model's own dtype, at native coordinates of one shot; affine in them.

        Needed wherever ``traits.pairing`` is given. A heads axis of 1 serves all heads.
        """
        raise NotImplementedError(
            f"{type(self).__name__}.rope: traits.pairing is {self.traits.pairing!r}, so the "
            "adapter must give angles; a model without RoPE has pairing=None"
        )

    def rotation(self, coords: Float[Tensor, "tokens axes"], shot: Shot, *, dtype: torch.dtype) -> Rotation:
        """Cosines and sines at native coordinates of a shot's tokens in self-attention (default: of :meth:`rope`).

        Override where the model's own are other than ``cos`` and ``sin`` of these, to the last bit.
        """
        assert self.traits.pairing is not None
        return rotation(self.rope(coords), pairing=self.traits.pairing, dtype=dtype)

    def rotate(self, x: Float[Tensor, "batch tokens heads head_dim"], by: Rotation) -> Tensor:
        """Queries or keys, turned (default: as :func:`lct_core.rotate`); override where the model rounds otherwise."""
        return rotate(x, by)

    def diagonal(self, device: torch.device | None) -> Float[Tensor, "heads pairs"] | None:
        """The angles of one step along the diagonal, by which a cached shot is moved; None without RoPE.

        Args:
            device: Where they are computed.
        """
        if self.traits.pairing is None:
            return None
        unit = torch.tensor([self.traits.unit], dtype=torch.float64, device=device)
        return (self.rope(unit) - self.rope(torch.zeros_like(unit)))[0]

    def coordinates(self, inputs: ShotInput, shot: Shot) -> Float[Tensor, "tokens axes"]:
        """The model's own coordinates of a shot's self-attention tokens, in its own order and units (float64, CPU).

        As many axes as ``traits.unit`` has. Default: text that has no RoPE at the origin, video at
        ``(frame, row, column)``.
        """
        return shot_coordinates(shot, scheme="anchored", text_first=self.traits.text_first).double()

    def shot(self, inputs: ShotInput) -> Shot:
        """The token counts of one shot with latents and text (default: the text as it comes, and the latents' patches).

        Raises:
            ValueError: naming what came, for latents, text or extras that the model cannot take.
        """
        check_inputs(inputs, self.traits, model=type(self.model).__name__)
        sizes = zip(inputs.latents.shape[2:], self.traits.patch, strict=True)
        frames, height, width = (size // patch for size, patch in sizes)
        grid = (0, 0, 0) if self.traits.text == "cross" and inputs.role == "global" else (frames, height, width)
        return Shot(text=inputs.text.shape[1], grid=grid, role=inputs.role)

    def example(self, shot: Shot, *, batch: int, generator: torch.Generator, dtype: torch.dtype) -> ShotInput:
        """Random inputs of a shot with all its extras but the text mask, for tests and benchmarks.

        Override where the model takes only some values.
        """
        size = [count * patch for count, patch in zip(shot.grid, self.traits.patch, strict=True)]
        latents = torch.randn(batch, self.traits.latent_channels, *size, generator=generator)
        least, most = self.traits.text_tokens
        tokens = max(least, shot.text if most is None else min(shot.text, most))
        text = torch.randn(batch, tokens, self.traits.text_width, generator=generator)
        extras = {
            name: torch.rand(batch, *self._extra_shape(extra, latents), generator=generator).to(dtype)
            for name, extra in self.traits.extras.items()
            if extra.shape is not None and name != self.traits.text_mask
        }
        if (name := self.traits.noisy_mask) in extras:  # each token clean or noisy, one of them noisy
            per_frame = extras[name].ndim == 2
            mask = torch.rand(batch, *shot.grid[: 1 if per_frame else 3], generator=generator) < 0.7
            mask.view(batch, -1)[:, 0] = True
            for axis in range(1, mask.ndim):
                mask = mask.repeat_interleave(int(self.traits.patch[axis - 1]), dim=axis)
            extras[name] = mask.to(dtype)
        return ShotInput(latents=latents.to(dtype), text=text.to(dtype), extras=extras, role=shot.role)

    def noisy(self, inputs: ShotInput) -> Tensor | None:
        """Where a shot's latents are at its noise level, and not a clean condition; None where all of them are.

        Boolean, ``[batch, 1, frames, height or 1, width or 1]``. What is clean stays as it is in sampling, and has no
        loss in training. Default: the extra that ``traits.noisy_mask`` names, where the shot has it.

        Raises:
            ValueError: for a mask of another shape, with other values than 0 and 1, or that cuts a token in two.
        """
        if (mask := inputs.extras.get(self.traits.noisy_mask or "")) is None:
            return None
        check_extras(inputs, self.traits, model=type(self.model).__name__)
        mask = mask.reshape(len(mask), 1, *mask.shape[1:], *[1] * (4 - mask.ndim))
        (t, h, w), spatial = self.traits.patch, mask.shape[3:] != (1, 1)
        patches = mask.unfold(2, t, t)
        if spatial:
            patches = patches.unfold(3, h, h).unfold(4, w, w)
        patches = patches.flatten(5)
        if not bool(((patches == 0).all(-1) | (patches == 1).all(-1)).all()):
            raise ValueError(
                f"extras: {self.traits.noisy_mask} has other values than 0 and 1, or both in one token, expected 0 "
                "where latents are clean, 1 where they are at the shot's noise level, alike in every patch of "
                f"{self.traits.patch}"
            )
        return mask.bool()

    def prepare(self, inputs: ShotInput) -> ShotInput:
        """The shot as :meth:`encode` gets it: padding cut off its text, and a global shot's image conditions zero.

        Raises:
            ValueError: for a text mask that differs within the batch, or has tokens behind its padding.
        """
        extras = dict(inputs.extras)
        if inputs.role == "global":
            for name, extra in self.traits.extras.items():
                if extra.required and extra.follows_latents:
                    shape = self._extra_shape(extra, inputs.latents)
                    extras.setdefault(name, inputs.latents.new_zeros(len(inputs.latents), *shape))
        mask, text = extras.pop(self.traits.text_mask or "", None), inputs.text
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.shape != text.shape[:2]:
                raise ValueError(
                    f"extras: {self.traits.text_mask} is {describe(mask)}, expected {list(text.shape[:2])}, 1 for "
                    "every text token and 0 for padding"
                )
            length = int(mask[0].bool().sum())
            if not bool((mask == (torch.arange(mask.shape[1], device=mask.device) < length)).all()):
                if not bool(((mask == 0) | (mask == 1)).all()):
                    raise ValueError(
                        f"extras: {self.traits.text_mask} has other values than 0 and 1, expected 1 for every text "
                        "token and 0 for padding: the tokenizer's mask, and not what is added to attention scores"
                    )
                raise ValueError(
                    f"extras: {self.traits.text_mask} has {mask.bool().sum(1).tolist()} tokens of text, expected the "
                    "same number in every entry of the batch, padding behind: entries of a batch share one layout; "
                    "call once for each, or put scenes side by side in a row"
                )
            text = text[:, :length].contiguous()  # a matmul's bits depend on the strides
        return replace(inputs, text=text, extras=extras)

    def _extra_shape(self, extra: Extra, latents: Tensor) -> list[int]:
        """The sizes of an extra's axes for some latents; an unconstrained axis gets one of ours."""
        return [axis if isinstance(axis, int) else _ANY_SIZE for axis in extra.axes(latents)]
