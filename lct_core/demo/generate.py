"""The demo's generations: every mode on a batch of scenes at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lct_core.backbone import ShotInput, collate_shots
from lct_core.codec import LinearCodec
from lct_core.demo.dataset import FRAMES, SIZE
from lct_core.generation import History, Sampling, autoregressive, causal, conditional, joint, start_scene
from lct_core.scene_model import SceneModel
from lct_core.script import Script

Shots = list[Tensor]
"""Of every shot, the frames of all scenes: RGB in [0, 1], ``[scenes, 3, frames, height, width]``."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SceneBatch:
    """Generates a batch of scenes, in every mode from the same noise.

    Args:
        model: The scene model.
        codec: Its codec.
        scripts: The scenes'; all have equally many shots and prompts of one length.
        frames: Frames of every shot of a scene (default: those of the world for all).
        seed: Of the noise.
        sampling: How it generates, one for all modes; its negative prompts encoded.
    """

    model: SceneModel
    codec: LinearCodec
    scripts: Sequence[Script]
    frames: Sequence[int] | None = None
    seed: int
    sampling: Sampling

    def independent(self) -> Shots:
        """Every shot by itself, without a global prompt, as the single-shot model was trained: the baseline."""
        shots = [shot for shot in self._scene() if shot.role != "global"]
        texts = [[script.shots[i].text for script in self.scripts] for i in range(len(shots))]
        alone = [
            [ShotInput(latents=shot.latents, text=torch.stack([self.codec.text(t) for t in prompts]))]
            for shot, prompts in zip(shots, texts, strict=True)
        ]
        return [self._decoded(joint(self.model, scene, sampling=self.sampling))[0] for scene in alone]

    def joint(self) -> Shots:
        """All shots at once."""
        return self._decoded(joint(self.model, self._scene(), sampling=self.sampling))

    def conditional(self, given: Mapping[int, Tensor]) -> Shots:
        """The others from given shots, by their number from 0: ``[scenes, 3, frames, height, width]``."""
        scene = self._scene()
        first = sum(shot.role == "global" for shot in scene)
        latents = {first + i: torch.stack([self.codec.encode(clip) for clip in clips]) for i, clips in given.items()}
        return self._decoded(conditional(self.model, scene, latents, sampling=self.sampling))

    def ar_bidirectional(self) -> Shots:
        """Shot after shot with bidirectional attention."""
        return self._decoded(autoregressive(self.model, self._scene(), seed=self.seed, sampling=self.sampling))

    def ar_causal(self, *, history: History | None = None) -> Shots:
        """Shot after shot with context-causal attention, through the KV cache."""
        return self._decoded(causal(self.model, self._scene(), history=history, seed=self.seed, sampling=self.sampling))

    def _scene(self) -> list[ShotInput]:
        count = len(self.scripts[0].shots)
        sizes = [(frames, SIZE, SIZE) for frames in self.frames or [FRAMES] * count]
        scenes = [
            start_scene(script, self.codec, sizes, seed=self.seed, scene=i) for i, script in enumerate(self.scripts)
        ]
        return [collate_shots(shots) for shots in zip(*scenes, strict=True)]

    def _decoded(self, result: Sequence[Tensor | None]) -> Shots:
        return [torch.stack([self.codec.decode(z) for z in latents]) for latents in result if latents is not None]
