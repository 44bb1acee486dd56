"""A single-shot DiT that sees a whole scene: what is given is checked here, and run by :mod:`lct_core.engine`."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from lct_core.backbone import Backbone
from lct_core.cache import KVCache
from lct_core.coordinates import Scheme, check_scheme
from lct_core.denoiser import Denoiser
from lct_core.engine.call import Call
from lct_core.engine.dispatch import install
from lct_core.engine.explain import check_finite, explained
from lct_core.engine.joining import rotates_plainly
from lct_core.engine.scene import Scene, as_scenes, complete, noise_levels
from lct_core.engine.visibility import TextScope, check_text_scope
from lct_core.fingerprint import fingerprint
from lct_core.layout import Layout
from lct_core.patterns import Pattern
from lct_core.plugins import registry
from lct_core.rope import Rotary


def retrofit(
    model: nn.Module,
    *,
    scheme: Scheme = "anchored",
    text: TextScope = "own",
    kernel: str = "auto",
    gradient_checkpointing: bool = False,
    batch_shots: bool = False,
    compile: bool = False,
    rotary: Rotary | None = None,
    backbone: str | Backbone | None = None,
) -> "SceneModel":
    """Make a scene model of a single-shot DiT, in place and without a new parameter.

    The model keeps its weights, its ``state_dict`` keys and its own forward: called as before, it does as before.

    Args:
        model: A model that an installed backbone handles (``lct backbones`` lists them), or that of ``backbone``.
        scheme: ``"anchored"`` (default: ours; exact for one shot) or ``"paper"``, see :func:`lct_core.coordinates`.
        text: Where the model cross-attends its text, which prompts a shot sees: its ``"own"`` (default: ours; exact for
            one shot), its ``"own_and_global"``, or ``"all"``, those of every shot that it sees. Text that takes part in
            self-attention is seen with its shot (paper, 3.2.2), and leaves no choice.
        kernel: Attention kernel, see :func:`lct_core.attend`.
        gradient_checkpointing: Whether training recomputes every block's activations in the backward pass; so does the
            model's own switch, ``model.gradient_checkpointing``.
        batch_shots: Whether shots of equal shape go through the blocks as one batch, apart from their attention: faster
            where shots are many and small, and the same but for the last bits (2e-6 in float32; default: one by one).
        compile: Whether what lies between two attentions runs under ``torch.compile`` (2e-6 in float32; default: no).
        rotary: What rotates queries and keys into their places, instead of torch's own operations: a function like
            :func:`lct_core.rope.rotate_into`, for models whose adapter rotates as :func:`lct_core.rotate` does.
        backbone: Name of the backbone to use, or an adapter of one's own; by default found by the model's class.

    Raises:
        ValueError: where no backbone, or more than one, handles the model, or it cannot be served as it is set up; for
            an unknown scheme, and a choice of text or rotary that the model does not have.
    """
    adapter = backbone if isinstance(backbone, Backbone) else registry().adapter(model, backbone)
    if adapter.model is not model:
        raise ValueError("backbone: this adapter adapts another model, expected one made with this model")
    return SceneModel(
        adapter,
        scheme=scheme,
        text=text,
        kernel=kernel,
        gradient_checkpointing=gradient_checkpointing,
        batch_shots=batch_shots,
        compile=compile,
        rotary=rotary,
    )


class SceneModel(Denoiser[KVCache]):
    """A single-shot DiT that sees whole scenes (paper, 3.2). Made by :func:`retrofit`.

    Not a module: ``backbone`` is, and is what one trains, saves and moves between devices.
    """

    _cache = KVCache

    def __init__(
        self,
        adapter: Backbone,
        *,
        scheme: Scheme,
        text: TextScope = "own",
        kernel: str,
        gradient_checkpointing: bool = False,
        batch_shots: bool = False,
        compile: bool = False,
        rotary: Rotary | None = None,
    ) -> None:
        self.adapter = adapter
        self.scheme: Scheme = check_scheme(scheme)
        self.text = check_text_scope(text, adapter)
        self.compile = compile
        self.rotary = _rotary(rotary, adapter)
        _check_served(adapter)
        self.kernel = registry().check_kernel(kernel)
        self.gradient_checkpointing = gradient_checkpointing
        self.batch_shots = batch_shots
        for module in (adapter.model, *adapter.blocks):
            install(module)

    @property
    def backbone(self) -> nn.Module:
        """The single-shot model itself."""
        return self.adapter.model

    def __call__(
        self,
        shots: Scene | Sequence[Scene],
        t: Float[Tensor, "*batch num_shots"],
        *,
        pattern: str | Pattern = "bidirectional",
        cache: KVCache | None = None,
        denoised: Sequence[int] | None = None,
        text_free: bool = False,
    ) -> list[Any]:
        """Predict for all shots of a scene at once, each at its own noise level.

        Args:
            shots: One scene, a sequence of shots; or several scenes, packed in one row, that do not see one another.
            t: Noise level of every shot in row order, 0 = clean, 1 = noise: ``[num_shots]`` or ``[batch, num_shots]``.
                A global shot is clean.
            pattern: ``"bidirectional"``, ``"context_causal"`` or ``"own_shot"``, or a function from a layout to a plan;
                with a cache, that layout begins with the history. A :class:`lct_core.routing.Router` makes its plans
                in every block, from queries and keys.
            cache: History that the shots also see; their own keys and values are written behind it. Takes one scene.
            denoised: Ignored: one model serves all levels, see :class:`lct_core.Experts`.
            text_free: Whether to leave the prompts out: the output of cross-attention to text is set to zero, and a
                cache gets no keys of text, so that what it keeps serves any prompt.

        Returns:
            Nested like ``shots``: the backbone's own prediction in the shape of each shot's latents; None for a global
            shot.

        Raises:
            ValueError: naming the argument, for anything that does not fit the model, the batch or the cache.
        """
        if not isinstance(cache, KVCache | None):
            raise ValueError(
                f"cache: got a {type(cache).__name__}, expected a KVCache, as model.new_cache() makes one, or None"
            )
        scenes, nested = as_scenes(shots)
        _check_served(self.adapter)
        if text_free and self.adapter.traits.text == "joint":
            raise ValueError(
                f"text_free: got True, but the text of {type(self.backbone).__name__} takes part in self-attention and "
                "cannot be left out of it; expected False, the default"
            )
        given = [shot for scene in scenes for shot in complete(scene, self.adapter)]
        for shot in given:
            self.adapter.shot(shot)  # refuses what came; then the same without padding
        with explained(self.adapter, given):
            inputs = [self.adapter.prepare(shot) for shot in given]
        check_finite(inputs)
        counts = [self.adapter.shot(shot) for shot in inputs]
        if self.text == "own" and self.adapter.traits.text == "cross" and "global" in [shot.role for shot in counts]:
            raise ValueError(
                'shots: got a global shot, which nobody sees: this model cross-attends its text, and text="own"; '
                'expected none, or retrofit(model, text="own_and_global")'
            )
        batch = len(inputs[0].latents)
        for i, shot in enumerate(inputs):
            if len(shot.latents) != batch:
                raise ValueError(
                    f"shots: shot {i} has a batch of {len(shot.latents)}, expected {batch} like the first: "
                    "entries of a batch share one layout; put other scenes side by side in a row"
                )
        levels = noise_levels(t, [shot.role for shot in counts], batch)
        flat = iter(counts)
        layout = Layout([[next(flat) for _ in scene] for scene in scenes], self.adapter.traits.text_first)
        call = Call(self, layout, inputs, levels, pattern, cache, text_free)
        with explained(self.adapter, inputs):
            outputs = iter(self.backbone(call, inputs))
        return [[next(outputs) for _ in scene] for scene in scenes] if nested else list(outputs)

    def fingerprint(self) -> dict[str, Any]:
        """What tells this model from others that would read its cache wrongly, as JSON can say it.

        Raises:
            ValueError: where weights are not in memory, being offloaded.
        """
        return fingerprint(self.adapter, scheme=self.scheme, text=self.text)


def _rotary(rotary: Rotary | None, adapter: Backbone) -> Rotary | None:
    if rotary is not None and not (adapter.traits.pairing and rotates_plainly(adapter)):
        has = "rotates in a way of its own" if adapter.traits.pairing else "has no RoPE"
        raise ValueError(f"rotary: got one, but this {type(adapter.model).__name__} {has}; expected None, the default")
    return rotary


def _check_served(adapter: Backbone) -> None:
    if reasons := adapter.refusals():
        raise ValueError(f"model: this {type(adapter.model).__name__} cannot be served: {'; '.join(reasons)}")
