"""A fingerprint of the model; loading with another model is refused."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lct_core.backbone import Backbone
from lct_core.rope import close_angles

_SAMPLES = 16  # values of each parameter that tell weights apart (ours)
_TRAITS = ("heads", "kv_heads", "head_dim", "text", "text_first", "pairing", "unit", "patch", "timesteps")

# What can differ, in the order in which it is compared: its name in the error, and the fix.
_ALIKE = {
    "class": ("class differs", "use a model of the class that wrote it"),
    "scheme": ("coordinate scheme differs", "retrofit with the scheme that wrote it"),
    "text": ("text scope differs", "retrofit with the text scope that wrote it"),
    "dtype": ("dtype differs", "use the model in the dtype that wrote it"),
    "boundary": ("boundary between its experts differs", "use the boundary that wrote it"),
    "parameters": ("number of parameters differs", "use a model of the size that wrote it"),
    "shapes": ("names and shapes of parameters differ", "use a model of the sizes that wrote it"),
    "traits": ("traits differ", "use the configuration that wrote it"),
    "angles": ("RoPE frequencies differ", "use the configuration that wrote it"),
    "weights": ("weights differ", "other weights of this class wrote it; use the checkpoint that did"),
}
_UNTOLD = ("shapes", "angles", "weights")  # hashes and numbers, which an error leaves out


def fingerprint(adapter: Backbone, *, scheme: str, text: str) -> dict[str, Any]:
    """What tells a model from others that would read its cache wrongly, as JSON can say it.

    Of the weights, 16 values of every parameter are looked at: cheap, and another checkpoint hardly has the same.

    Args:
        adapter: The model's adapter.
        scheme: The coordinates that the model was retrofitted with.
        text: Which prompts a shot cross-attends to.

    Raises:
        ValueError: where weights are not in memory, being offloaded.
    """
    module, traits = adapter.model, adapter.traits
    parameters = list(module.named_parameters())
    if meta := [name for name, x in parameters if x.is_meta]:
        raise ValueError(
            f"model: {len(meta)} of its {len(parameters)} weights are not in memory, such as {meta[0]!r}: they are "
            "offloaded to where they cannot be told from others; bring the model back, by accelerate's "
            "remove_hook_from_module(model, recurse=True) for example, before a cache is saved or loaded"
        )
    return {
        "class": type(module).__name__,
        "scheme": scheme,
        "text": text,
        "dtype": sorted({str(x.dtype).removeprefix("torch.") for _, x in parameters}),
        "parameters": sum(x.numel() for _, x in parameters),
        "shapes": _sha256(*(f"{name} {list(x.shape)}".encode() for name, x in parameters)),
        "traits": {name: _plain(getattr(traits, name)) for name in _TRAITS},
        "angles": _angles(adapter),
        "weights": _sha256(*(part for name, x in parameters for part in (f"{name} {x.dtype}".encode(), _samples(x)))),
    }


def check_fingerprint(saved: Mapping[str, Any], here: Mapping[str, Any], *, whose: str = "") -> None:
    """Refuse what another model wrote.

    Args:
        saved: The fingerprint of the model that wrote it, of two experts that of each under its name.
        here: The fingerprint of the model that is to read it.
        whose: What an error puts before the thing that differs: which of two experts it is.

    Raises:
        ValueError: naming the first thing that differs.
    """
    for key, (what, fix) in _ALIKE.items():
        then, now = saved.get(key), here.get(key)
        if then == now or (key == "angles" and then and now and close_angles(then, now)):
            continue
        if isinstance(then, Mapping) and isinstance(now, Mapping):
            then, now = ({k: v for k, v in one.items() if then.get(k) != now.get(k)} for one in (then, now))
        told = "" if key in _UNTOLD else f"it was written by {then!r}, this is {now!r}; "
        raise ValueError(f"model: its {whose}{what}: {told}{fix}")
    for expert in ("high", "low"):
        if expert in here:
            check_fingerprint(saved[expert], here[expert], whose=f"{expert}-noise expert's ")


@torch.no_grad()
def _angles(adapter: Backbone) -> list[float]:
    """Angles of one step along the diagonal, by which cached keys are rotated; none without RoPE."""
    step = adapter.diagonal(next((x.device for x in adapter.model.parameters()), None))
    return [] if step is None else step.double().flatten().tolist()


def _samples(x: Tensor) -> bytes:
    """The bytes of some values, evenly spaced from the first to the last."""
    flat = x.detach().reshape(-1, 1).view(torch.uint8)  # a row of bytes for every value, in any dtype
    count = min(len(flat), _SAMPLES)
    places = [i * (len(flat) - 1) // max(count - 1, 1) for i in range(count)]
    return flat[places].cpu().numpy().tobytes()


def _sha256(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
