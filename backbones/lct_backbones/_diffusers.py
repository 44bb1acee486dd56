"""What the adapters of diffusers' models share, so that each says only what is special about its family."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from einops import rearrange
from torch import Tensor, nn

from lct_core import Backbone, Extra, Shot, ShotInput, Site, State, Traits, angles

_HARMLESS = ("group_offloading", "lazy_prefetch", "layer_execution_tracker", "layerwise_casting", "peft_autocast")

Heads = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values, ``[batch, tokens, heads, head_dim]``."""


class DiffusersBackbone(Backbone):
    """The adapter of a model as diffusers ships it: plain modules, each attention with its processor."""

    model: Any
    #: Names of the attention processors whose arithmetic the adapter has.
    processors: ClassVar[tuple[str, ...]]
    #: The model's lists of blocks, in order.
    stacks: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    #: The order in which the head's channels hold a patch: (t)ime, (h)eight, (w)idth, (c)hannel.
    patches: ClassVar[str] = "(c t h w)"
    #: Extras whose tokens join those of the text in self-attention.
    texts: ClassVar[tuple[str, ...]] = ()
    #: Radians per coordinate, ``[3, pairs]``, in the dtype of the model's own angles; for models with RoPE.
    frequencies: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.traits = self.describe(model.config)

    @abstractmethod
    def describe(self, config: Any) -> Traits:
        """What the model is like, from its configuration."""

    def common(self, config: Any, **traits: Any) -> Traits:
        """Traits whose values most configurations give under the same names."""
        heads, channels = config.num_attention_heads, config.get("out_channels") or config.in_channels
        shared = {"latent_channels": channels, "heads": heads, "kv_heads": heads, "head_dim": config.attention_head_dim}
        size, text_width = config.get("patch_size"), config.get("text_embed_dim") or config.get("joint_attention_dim")
        patch = (config.get("patch_size_t") or 1, size, size) if isinstance(size, int) else size
        if mask := traits.get("text_mask"):
            traits["extras"] = {mask: Extra(("tokens",)), **traits.get("extras", {})}
        return Traits(**{**shared, "patch": patch, "text_width": text_width, **traits})

    def condition(self, config: Any, *, packed: int = 1, required: bool = True) -> dict[str, Extra]:
        """The extra for image channels that the model takes behind those of the latents, where there are any.

        Args:
            config: Of a model that takes no other channels beside those that it predicts.
            packed: Latents whose channels it counts as those of one token.
            required: Whether a shot must have it.
        """
        channels = (config.in_channels - (config.out_channels or config.in_channels)) // packed
        shape = (channels, "frames", "height", "width")
        return {"condition": Extra(shape, required=required, image=True)} if channels else {}

    def beside_time(self, config: Any) -> dict[str, Extra]:
        """The extras that are embedded with the time: a pooled prompt, and guidance where the model is distilled."""
        width = config.get("pooled_projection_dim")
        pooled = {"pooled_projections": Extra((width,), required=True, prompt=True)} if width else {}
        return {**pooled, "guidance": Extra((), required=True)} if config.get("guidance_embeds") else pooled

    def shot(self, inputs: ShotInput) -> Shot:
        """As for any model; text counts that of :attr:`texts` too."""
        shot = super().shot(inputs)
        return replace(shot, text=shot.text + sum(inputs.extras[x].shape[1] for x in self.texts if x in inputs.extras))

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Those of every stack."""
        return [block for stack in self.stacks for block in getattr(self.model, stack)]

    def sites(self, block: Any) -> Sequence[Site]:
        """Where text is cross-attended: self-attention, then text."""
        return (Site("attn1"), Site("attn2", "text")) if self.traits.text == "cross" else super().sites(block)

    def rope(self, coords: Tensor) -> Tensor:
        """Coordinates times frequencies."""
        return angles(coords, self.frequencies)

    def arguments(self, inputs: ShotInput, timestep: Tensor) -> dict[str, Any]:
        """What the model's own forward takes for a shot, by name: the condition joined to the latents, a text mask, and
        timesteps of tokens where the shot has a mask for them.
        """
        extras, latents, text = dict(inputs.extras), inputs.latents, inputs.text
        if "condition" in extras:
            latents = torch.cat([latents, extras.pop("condition")], dim=1)
        if (mask := self.traits.noisy_mask) in extras:
            timestep = token_timesteps(timestep, extras.pop(mask), self.traits.patch)
        if self.traits.text_mask is not None:
            extras.setdefault(self.traits.text_mask, text.new_ones(text.shape[:2], dtype=torch.bool))
        return {"hidden_states": latents, "timestep": timestep, "encoder_hidden_states": text, **extras}

    def single_shot(self, inputs: ShotInput, timestep: Tensor) -> Tensor:
        """The model's own forward."""
        return self.model(**self.arguments(inputs, timestep), return_dict=False)[0]

    def joined(self, text: Tensor, video: Tensor) -> Tensor:
        """Tokens of both streams in the model's order, for weights that they share."""
        return torch.cat([text, video] if self.traits.text_first else [video, text], dim=1)

    def project_both(self, attn: Any, text: Tensor, video: Tensor) -> Heads:
        """Queries, keys and values of both streams in the model's order, each stream's by weights of its own."""
        added = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
        of_text = _normed(attn, added, (attn.norm_added_q, attn.norm_added_k, None), across_heads=False)
        q, k, v = (self.joined(*pair) for pair in zip(of_text, project(attn, video), strict=True))
        return q, k, v

    def apart(self, both: Tensor, text: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
        """Text and video of tokens of both streams, as many of each as these have."""
        if self.traits.text_first:
            of_text, of_video = both.split([text.shape[1], video.shape[1]], dim=1)
        else:
            of_video, of_text = both.split([video.shape[1], text.shape[1]], dim=1)
        return of_text, of_video

    def head(self, state: State) -> Tensor:
        """The final layer, modulated by the time."""
        return self.model.proj_out(self.model.norm_out(state.streams["video"], state.conditioning["time"]))

    def unpatchify(self, tokens: Tensor, shot: Shot) -> Tensor:
        """Patches to latents."""
        (f, y, x), (t, h, w) = shot.grid, self.traits.patch
        pattern = f"b (f y x) {self.patches} -> b c (f t) (y h) (x w)"
        return rearrange(tokens, pattern, f=f, y=y, x=x, t=t, h=h, w=w)

    def cast(self, dtype: torch.dtype) -> None:
        """As ``from_pretrained(torch_dtype=...)``: named modules, and what is not loaded, stay in float32."""
        exact = set(self.model._keep_in_fp32_modules or ())
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(torch.float32 if exact & set(name.split(".")) else dtype)

    def attentions(self) -> Iterable[nn.Module]:
        """The attention modules of all blocks."""
        return [module for block in self.blocks for module in block.children() if hasattr(module, "processor")]

    def refusals(self) -> list[str]:
        """Features of diffusers that replace a part of the forward, which the engine would pass over."""
        reasons = []
        if getattr(self.model, "is_cache_enabled", False):
            reasons.append("a block cache is on, which skips blocks; call model.disable_cache()")
        if getattr(self.model, "_parallel_config", None) is not None:
            reasons.append("parallelism of diffusers is on, which splits its tokens or heads; load it without")
        attentions: list[Any] = list(self.attentions())
        own = [a for a in attentions if isinstance(a, AttentionModuleMixin)]  # others swap their processors
        if any(getattr(attention, "fused_projections", False) for attention in own):
            reasons.append("its query, key and value projections are fused; call model.unfuse_qkv_projections()")
        hooks = {name for a in attentions for name in getattr(getattr(a, "_diffusers_hook", None), "hooks", ())}
        if foreign := sorted(hook for hook in hooks if not hook.startswith(_HARMLESS)):
            reasons.append(f"its attention has hooks {foreign}, which its scene model would not run; remove them")
        processors = [attention.processor for attention in attentions]
        if others := {type(processor).__name__ for processor in processors} - set(self.processors):
            reasons.append(
                f"its attention runs {sorted(others)}, which the adapter does not know, expected "
                f"{list(self.processors)}; set that processor: by model.unfuse_qkv_projections() after fusing, "
                "else by loading the model without an IP-Adapter and the like"
            )
        if any(getattr(processor, "_attention_backend", None) is not None for processor in processors):
            reasons.append(
                "an attention backend is set, which its scene model would not use; call "
                "model.reset_attention_backend() and choose with lct_core.retrofit(model, kernel=...)"
            )
        return reasons


def project(attn: Any, x: Tensor, source: Tensor | None = None, *, across_heads: bool = False) -> Heads:
    """Queries of ``x``, keys and values of ``source`` (default: of ``x``), queries and keys normed.

    Args:
        attn: A diffusers attention with ``to_q``, ``to_k``, ``to_v`` and, where they are not None, its norms.
        x: ``[batch, tokens, width]``.
        source: The same.
        across_heads: Whether the norm is over all heads together, and not over each.
    """
    source = x if source is None else source
    projected = attn.to_q(x), attn.to_k(source), attn.to_v(source)
    return _normed(attn, projected, (attn.norm_q, attn.norm_k, None), across_heads)


def project_out(attn: Any, x: Tensor) -> Tensor:
    """The output projection, with its dropout."""
    return attn.to_out[1](attn.to_out[0](x))


def attend_image(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Cross-attention to the tokens of an image, which stays inside its shot; ``[batch, tokens, heads, head_dim]``."""
    return dispatch_attention_fn(q, k, v).type_as(q)


def modulations(table: Tensor, of_time: Tensor | int) -> tuple[Tensor, ...]:
    """The rows of a learned table, each with its part of the time's ``[batch, 1 or tokens, rows, width]``."""
    return (table + of_time).unbind(-2)


def modulated(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Tokens normed and modulated; and the other modulations, as they are. All are ``[batch, 1 or tokens, width]``."""
    return norm(x) * (1 + scale) + shift, *others


def adaptive(norm: nn.Module, x: Tensor, time: Tensor) -> tuple[Tensor, ...]:
    """Tokens modulated by a norm that makes its modulations from the time; the others are ``[batch, 1, width]``."""
    x, *others = norm(x, emb=time)
    return x, *(part[:, None] for part in others)


def gated_mlp(x: Tensor, norm: nn.Module, mlp: nn.Module, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    """A modulated and gated MLP, added to its input; modulation is ``[batch, 1 or tokens, width]``."""
    return x + gate * mlp(norm(x) * (1 + scale) + shift)


def finished(x: Tensor, attended: Tensor, norm: nn.Module, mlp: nn.Module, gate: Tensor, *of_mlp: Tensor) -> Tensor:
    """A stream to its block's end: what it attended to through its gate, then :func:`gated_mlp`."""
    return gated_mlp(x + gate * attended, norm, mlp, *of_mlp)


def spread(grid: tuple[int, int, int], trained: tuple[int, int]) -> Tensor:
    """Coordinates of a video's tokens in the middle of the grid that the model was trained on, as CogVideoX has them.

    The largest crop of that grid in the video's shape has the video's rows and columns spread over it.

    Args:
        grid: Frames, rows and columns of the video's tokens.
        trained: Rows and columns of the grid.

    Returns:
        ``[tokens, 3]``, float32; frames are 1 apart.
    """
    frames, *sides = grid
    scale = min(whole / n for whole, n in zip(trained, sides, strict=True))
    axes = [torch.arange(frames, dtype=torch.float32)]
    for whole, n in zip(trained, sides, strict=True):
        size = round(scale * n)
        start = round((whole - size) / 2)
        axes.append(torch.linspace(start, (start + size) * (n - 1) / n, n, dtype=torch.float32))
    return torch.cartesian_prod(*axes)


def token_timesteps(timestep: Tensor, mask: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """The timestep of every token, where the model takes one for each.

    Args:
        timestep: Of the shot, ``[batch]``.
        mask: ``[batch, frames, height, width]`` of the latents, or ``[batch, frames]``: 0 where they are clean, a
            condition, and 1 elsewhere.
        patch: Latents that make one token; its first one decides.

    Returns:
        ``[batch, tokens]``, or ``[batch, frames of tokens]``.

    Raises:
        ValueError: for a mask outside [0, 1].
    """
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ValueError(
            f"extras: timestep_mask goes from {mask.min().item():g} to {mask.max().item():g}, expected [0, 1]: 0 where "
            "the latents are clean, 1 where they are at the shot's noise level"
        )
    t, h, w = patch
    mask = mask.reshape(*mask.shape, *[1] * (4 - mask.ndim))
    return (mask[:, ::t, ::h, ::w] * timestep.view(-1, 1, 1, 1)).flatten(1)


def _normed(attn: Any, projected: Heads, norms: tuple[Any, Any, Any], across_heads: bool) -> Heads:
    q, k, v = (
        norm(x).unflatten(2, (attn.heads, -1)) if across_heads else norm(x.unflatten(2, (attn.heads, -1)))
        for x, norm in ((x, norm or nn.Identity()) for x, norm in zip(projected, norms, strict=True))
    )
    return q, k, v
