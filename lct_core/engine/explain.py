"""What the engine finds wrong with a shot only when it is run: values, and a dtype or device unlike the weights'."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lct_core._describe import describe
from lct_core.backbone import Backbone, ShotInput


@contextmanager
def explained(adapter: Backbone, shots: Sequence[ShotInput]) -> Iterator[None]:
    """Where torch fails, and an input has another dtype or device than the weights, say that this may be why.

    Only then: autocast, offloading, sharding and some models themselves bring the two together.

    Raises:
        ValueError: from torch's error, which it quotes.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        without_values = any(shot.latents.is_meta or shot.text.is_meta for shot in shots)
        if isinstance(error, NotImplementedError) and not without_values:
            raise  # an adapter's own; torch raises it for tensors on "meta"
        if reason := _mismatch(adapter, shots):
            raise ValueError(f"{reason}; torch says: {error}") from error
        raise


def check_finite(shots: Sequence[ShotInput]) -> None:
    """Refuse extras with values that are not finite, which an embedding could hide; those of latents and text show.

    On the CPU alone: elsewhere, a look at them would wait for the device at every step.
    """
    for shot in shots:
        for name, x in shot.extras.items():
            if isinstance(x, Tensor) and x.device.type == "cpu" and not bool(x.isfinite().all()):
                raise ValueError(
                    f"extras: {name} {describe(x)} has values that are not finite, expected finite ones; look at what "
                    "encoded it"
                )


def check_places(coords: Tensor, given: ShotInput) -> None:
    """Refuse coordinates that are not finite: a frame rate of almost nothing puts tokens at infinity."""
    if not bool(coords.isfinite().all()):
        numbers = {name: x for name, x in given.extras.items() if not isinstance(x, Tensor)}
        raise ValueError(
            f"extras: with {numbers or 'no numbers'}, tokens lie at places that are not finite, expected a frame rate "
            "and the like in their usual units"
        )


def _mismatch(adapter: Backbone, shots: Sequence[ShotInput]) -> str | None:
    """The first input that is unlike the weights, in words."""
    sizes: Counter[torch.dtype] = Counter()
    devices: set[torch.device] = set()
    for weight in adapter.model.parameters():
        if weight.is_floating_point() and weight.dtype.itemsize > 1:  # smaller ones are stored, not computed with
            sizes[weight.dtype] += weight.numel()
            devices.add(weight.device)
    if not sizes:
        return None
    dtype, offloaded = max(sizes, key=sizes.__getitem__), torch.device("meta") in devices
    for i, shot in enumerate(shots):
        extras = {f"extras: {n}": x for n, x in shot.extras.items() if adapter.traits.extras[n].has_channels}
        for name, x in {"latents": shot.latents, "text": shot.text, **extras}.items():
            away = not offloaded and x.device not in devices
            cast = x.dtype != torch.float64 and not x.is_meta  # what autocast would cast
            if away or (x.dtype != dtype and not (cast and torch.is_autocast_enabled(x.device.type))):
                place = "" if offloaded else f" on {' or '.join(sorted(map(str, devices)))}"
                return (
                    f"{name}: got {x.dtype} on {x.device} in shot {i}, expected {dtype}{place}, as the model's weights "
                    f"are; convert one or the other{', or call under torch.autocast' if cast else ''}"
                )
    return None
