"""What stands around a video DiT: pictures to latents and back, and prompts to text tokens."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Codec", "LinearCodec", "words"]


@runtime_checkable
class Codec(Protocol):
    """A video autoencoder and a text encoder, as tuning and generation use them; one shot or prompt at a time.

    Around a real model these are its VAE and its text encoder. They are called without recording gradients. What goes
    in is float32 on the CPU; what comes out may be in any floating dtype on any device: noise is added in float32, and
    the model gets what it is called with. A ValueError from here is shown to the user as it is.

    There is no place in it for a model's required extras, a pooled prompt or an image condition: with such models, make
    each :class:`lct_core.ShotInput` yourself, for :func:`lct_core.tuning_loss` and the modes of generation.
    """

    def encode(self, frames: Float[Tensor, "3 frames height width"]) -> Float[Tensor, "channels t y x"]:
        """RGB in [0, 1] to clean latents, normalised as the model takes them."""
        ...

    def decode(self, latents: Float[Tensor, "channels t y x"]) -> Float[Tensor, "3 frames height width"]:
        """Latents to RGB in [0, 1]."""
        ...

    def text(self, prompt: str) -> Float[Tensor, "tokens width"]:
        """A prompt to text tokens; an empty one to what stands for no prompt (guidance, text dropout)."""
        ...

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """The shape of :meth:`encode`'s latents for so many frames of so many pixels."""
        ...


class LinearCodec:
    """A small stand-in for a VAE and a text encoder, so that everything runs without downloaded weights.

    Pictures: the principal components of square patches, frame by frame; linear, so an image is a clip of one frame.
    Latents have unit variance as a whole. Prompts: one-hot tokens of a vocabulary of words and phrases, the longest
    that fits first, whatever the case; punctuation means nothing.

    Args:
        mean: The mean patch, ``[3 * patch * patch]``, RGB in [0, 1].
        components: What every latent channel adds to it, ``[channels, 3 * patch * patch]``: orthogonal, equally long.
        vocabulary: Words and phrases that prompts are made of.
        length: Shorter prompts are filled up with zero rows to so many tokens, so that they can be batched. An empty
            prompt is zero rows alone.

    Raises:
        ValueError: for components that don't fit the mean, aren't orthogonal or not equally long, an empty vocabulary
            or a repeated phrase.
    """

    def __init__(self, *, mean: Tensor, components: Tensor, vocabulary: Sequence[str], length: int = 1) -> None:
        patch = round((mean.numel() / 3) ** 0.5)
        if mean.shape != (3 * patch * patch,) or components.shape[1:] != mean.shape or not len(components):
            raise ValueError(
                f"components: got {list(components.shape)} with a mean of {list(mean.shape)}, expected "
                "[channels, n] and [n], n = 3 x patch x patch"
            )
        gram = components @ components.T
        even = gram[0, 0] * torch.eye(len(gram)).to(gram)
        if not gram[0, 0] > 0 or not torch.allclose(gram, even, atol=1e-3 * float(gram[0, 0])):
            raise ValueError("components: expected them orthogonal and equally long, as LinearCodec.fit makes them")
        if length < 1:
            raise ValueError(f"length: got {length}, expected at least 1")
        self.patch, self.length = patch, length
        self.mean, self.components, self.vocabulary = mean, components, tuple(vocabulary)
        self._index = {_plain(phrase): i for i, phrase in enumerate(self.vocabulary)}
        if not self._index or "" in self._index or len(self._index) != len(self.vocabulary):
            raise ValueError("vocabulary: got an empty or repeated phrase, or none, expected each phrase once")
        self._longest = max(len(phrase.split()) for phrase in self._index)

    @classmethod
    def fit(
        cls,
        clips: Iterable[Float[Tensor, "3 frames height width"]],
        *,
        patch: int,
        channels: int,
        vocabulary: Sequence[str],
        length: int = 1,
    ) -> "LinearCodec":
        """Principal components of the clips' patches.

        Args:
            clips: RGB in [0, 1]; height and width are multiples of the patch.
            patch: Pixels of a patch's side.
            channels: Components to keep, at most ``3 * patch * patch``.
            vocabulary: See the class.
            length: See the class.

        Raises:
            ValueError: for no clips or too many channels.
        """
        size = 3 * patch * patch
        if not 1 <= channels <= size:
            raise ValueError(f"channels: got {channels}, expected 1 to {size}, three times the pixels of a patch")
        count, total, products = 0, torch.zeros(size).double(), torch.zeros(size, size).double()
        for clip in clips:
            patches = _patches(clip, patch).flatten(0, -2).double()
            count, total, products = count + len(patches), total + patches.sum(0), products + patches.T @ patches
        if not count:
            raise ValueError("clips: got none, expected at least one to learn patches from")
        mean = total / count
        variances, vectors = torch.linalg.eigh(products / count - mean.outer(mean))
        kept = variances.flip(0)[:channels].clamp(min=0)
        scale = kept.mean().sqrt().clamp(min=1e-6)
        return cls(
            mean=mean.float(),
            components=(vectors.flip(1)[:, :channels].T * scale).float(),
            vocabulary=vocabulary,
            length=length,
        )

    @property
    def text_width(self) -> int:
        """Channels of an encoded prompt."""
        return len(self.vocabulary)

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return len(self.components)

    def state(self) -> dict[str, Any]:
        """What ``LinearCodec(**state)`` makes the same codec of."""
        return {
            "mean": self.mean,
            "components": self.components,
            "vocabulary": list(self.vocabulary),
            "length": self.length,
        }

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """One latent frame for each frame, one place for each patch.

        Raises:
            ValueError: for a size that is not made of whole patches.
        """
        if frames < 1 or height < 1 or width < 1 or height % self.patch or width % self.patch:
            raise ValueError(
                f"frames: got {frames} of {height} x {width} pixels, expected at least one, height and width positive "
                f"multiples of {self.patch}; read the video with multiple={self.patch}"
            )
        return self.channels, frames, height // self.patch, width // self.patch

    def encode(self, frames: Tensor) -> Tensor:
        """Project every patch on the components; arithmetic in float32.

        Raises:
            ValueError: for frames of another shape, or not of whole patches.
        """
        if frames.ndim != 4 or len(frames) != 3:
            raise ValueError(f"frames: got {list(frames.shape)}, expected [3, frames, height, width]")
        self.latent_shape(*frames.shape[1:])
        latents = (_patches(frames.float(), self.patch) - self.mean) @ self.components.T
        return rearrange(latents / self.components[0].square().sum(), "t y x c -> c t y x").contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """Add the components up again, clamped to [0, 1]."""
        patches = rearrange(latents.float(), "c t y x -> t y x c") @ self.components + self.mean
        frames = rearrange(patches, "t y x (c p q) -> c t (y p) (x q)", c=3, p=self.patch, q=self.patch)
        return frames.clamp(0, 1)

    def text(self, prompt: str) -> Tensor:
        """One row for every phrase.

        Raises:
            ValueError: for a word that is in no phrase.
        """
        words, found = _plain(prompt).split(), []
        while words:
            for count in range(min(self._longest, len(words)), 0, -1):
                if (index := self._index.get(" ".join(words[:count]))) is not None:
                    break
            else:
                raise ValueError(
                    f"prompt: {words[0]!r} in {prompt!r} is not among the words that this codec knows: "
                    f"{', '.join(self.vocabulary[:12])}{', ...' if len(self.vocabulary) > 12 else ''}"
                )
            found.append(index)
            words = words[count:]
        rows = F.one_hot(torch.tensor(found, dtype=torch.long), self.text_width).float()
        return torch.cat([rows, rows.new_zeros(max(0, self.length - len(rows)), self.text_width)])


def words(prompts: Iterable[str]) -> list[str]:
    """Every word of some prompts once, in order: a vocabulary for :class:`LinearCodec`."""
    return list(dict.fromkeys(word for prompt in prompts for word in _plain(prompt).split()))


def _plain(text: str) -> str:
    """Words in lower case with single spaces; "[SHOT CUT]" and what else stands in brackets keeps them.

    Apostrophes and hyphens belong to a word only inside it.
    """
    return " ".join(re.findall(r"[\w\[\]]+(?:['-][\w\[\]]+)*", text.lower().replace("\u2019", "'")))


def _patches(frames: Tensor, patch: int) -> Float[Tensor, "t y x patch"]:
    return rearrange(frames, "c t (y p) (x q) -> t y x (c p q)", p=patch, q=patch)
