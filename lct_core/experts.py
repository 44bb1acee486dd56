"""Two experts that share out the noise levels, each a scene model with a cache of its own (Wan 2.2, A14B)."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lct_core.cache import ExpertCache
from lct_core.denoiser import Denoiser
from lct_core.engine.scene import Scene, as_scenes, noise_levels
from lct_core.patterns import Pattern
from lct_core.scene_model import SceneModel


class Experts(Denoiser[ExpertCache]):
    """Two scene models, one for high noise levels and one for low ones; used like a :class:`SceneModel`.

    The level of the shots that are being denoised decides which of them runs, not that of conditions or history.

    Args:
        high: The expert of levels from ``boundary`` up (diffusers: ``pipeline.transformer``).
        low: The expert of levels below it (diffusers: ``pipeline.transformer_2``).
        boundary: The level where they meet (diffusers: ``boundary_ratio``; upstream, Wan 2.2: 0.875 for text to video,
            0.9 for image to video).

    Raises:
        ValueError: for experts that do not take the same inputs, and a boundary outside (0, 1).
    """

    several = True
    _cache = ExpertCache

    def __init__(self, high: SceneModel, low: SceneModel, *, boundary: float) -> None:
        if not 0 < boundary < 1:
            raise ValueError(f"boundary: got {boundary!r}, expected a noise level between 0 and 1, such as 0.875")
        if high.adapter.traits != low.adapter.traits or (high.scheme, high.text) != (low.scheme, low.text):
            raise ValueError(
                "high, low: their traits, scheme or text differ, expected two experts of one model, retrofitted alike"
            )
        self.high, self.low, self.boundary = high, low, boundary
        self.adapter, self.scheme, self.text = high.adapter, high.scheme, high.text

    def __call__(
        self,
        shots: Scene | Sequence[Scene],
        t: Float[Tensor, "*batch num_shots"],
        *,
        pattern: str | Pattern = "bidirectional",
        cache: ExpertCache | None = None,
        denoised: Sequence[int] | None = None,
        text_free: bool = False,
    ) -> list[Any]:
        """Predict for all shots at once, as :class:`SceneModel` does, by the expert of the denoised shots' level.

        Args:
            shots: As :class:`SceneModel` takes them.
            t: Noise level of every shot.
            pattern: As :class:`SceneModel` takes it.
            cache: The history; the expert that runs sees and writes its own.
            denoised: The shots that are being denoised, counted from 0 in row order (default: the noisiest). None of
                them, ``()``, is for a pass that writes history: both experts run, each for its own cache.
            text_free: As :class:`SceneModel` takes it.

        Raises:
            ValueError: where the denoised shots lie on both sides of the boundary, and as :class:`SceneModel` does.
        """
        if cache is not None and not isinstance(cache, ExpertCache):
            raise ValueError(f"cache: got a {type(cache).__name__}, expected an ExpertCache: one history per expert")
        high, low = (self.high, None if cache is None else cache.high), (self.low, None if cache is None else cache.low)
        if denoised is not None and not len(denoised):
            chosen = [high, low]
        else:
            chosen = [high if self._is_high(shots, t, denoised) else low]
        if cache is not None:
            cache.written_by_both = False
        *_, outputs = [expert(shots, t, pattern=pattern, cache=own, text_free=text_free) for expert, own in chosen]
        if cache is not None:
            cache.written_by_both = len(chosen) == 2
        return outputs

    def fingerprint(self) -> dict[str, Any]:
        """What tells these experts from others, as JSON can say it, see :meth:`SceneModel.fingerprint`."""
        high, low = self.high.fingerprint(), self.low.fingerprint()
        return {"class": type(self).__name__, "boundary": self.boundary, "high": high, "low": low}

    def _is_high(self, shots: Scene | Sequence[Scene], t: Tensor, denoised: Sequence[int] | None) -> bool:
        scenes, _ = as_scenes(shots)
        inputs = [shot for scene in scenes for shot in scene]
        batch = len(inputs[0].text) if isinstance(inputs[0].text, Tensor) else 1  # else the expert says what is wrong
        levels = noise_levels(t, [shot.role for shot in inputs], batch)
        shots_alone = [i for i, shot in enumerate(inputs) if shot.role == "shot"]
        if denoised is None:
            deciding = levels.amax(dim=1)
        elif set(denoised) <= set(shots_alone):
            deciding = levels[:, list(denoised)]
        else:
            raise ValueError(f"denoised: got {list(denoised)}, expected some of {shots_alone}: shots, counted from 0")
        high = deciding >= self.boundary
        if bool(high.any()) != bool(high.all()):
            raise ValueError(
                f"t: the denoised shots are at {deciding.flatten().tolist()}, on both sides of the boundary "
                f"{self.boundary}, expected one side: one expert runs at a time; call once for each side"
            )
        return bool(high.any())
