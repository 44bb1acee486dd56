"""A scene model by another road: the model's own, unmodified forward on every shot, their attentions joined outside.

Every shot runs in a thread of its own. Where the forward calls ``scaled_dot_product_attention`` inside a module that
joins shots, the threads wait for one another, and each attends to its own keys and those of the shots that it sees.
Nothing here knows the engine or an adapter: what it shares with a retrofitted model is the model's weights.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

_TIMEOUT = 60  # seconds for a thread to come to the next attention


class Join(NamedTuple):
    """How an attention joins shots.

    Args:
        sees: Which shots' keys the queries of a shot see, ``[shots, shots]``; the identity where it does not join them.
        turned: Whether queries and keys move with their shot along the diagonal; not where keys are text or an image.
    """

    sees: Bool[Tensor, "shots shots"]
    turned: bool = True


def lockstep(
    forwards: Sequence[Callable[[], Tensor]],
    joins: Mapping[nn.Module, Join | Sequence[Join]],
    *,
    offsets: Sequence[float],
    diagonal: Float[Tensor, "heads pairs"] | None,
    pairing: str = "interleaved",
) -> list[Tensor]:
    """The outputs of some forwards whose attentions see one another's keys.

    Args:
        forwards: The model's own forward on each shot.
        joins: The attention modules that join shots; all others stay inside their shot. One Join where all attentions
            of a module join alike; one for each, in the order of its forward, where they differ.
        offsets: Diagonal steps by which each shot is moved.
        diagonal: Angles of one diagonal step, float64 radians: ``[heads or 1, pairs]``; None without RoPE.
        pairing: As :func:`lct_core.rotation` names them.

    Returns:
        What the forwards return, in order.

    Raises:
        RuntimeError: where a forward fails, the forwards do not come to the same attentions, one of the modules never
            calls ``scaled_dot_product_attention``, or not once for each of its Joins, or calls it causally or with a
            mask that hides something.
    """
    attention, local = F.scaled_dot_product_attention, threading.local()
    barrier = threading.Barrier(len(forwards))
    slots: list[Any] = [None] * len(forwards)
    results: list[Any] = [None] * len(forwards)
    errors: list[BaseException] = []
    came: set[nn.Module] = set()
    grad = torch.is_grad_enabled()

    def joined(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        module, shot = getattr(local, "module", None), getattr(local, "shot", None)
        if module is None or shot is None:
            return attention(query, key, value, *args, **kwargs)
        how, call, local.calls = joins[module], local.calls, local.calls + 1
        if not isinstance(how, Join):
            if call >= len(how):  # an error, raised once all calls are counted
                return attention(query, key, value, *args, **kwargs)
            how = how[call]
        q, k, v = query, key, value
        mask = kwargs.get("attn_mask", args[0] if args else None)
        hides = mask is not None and not bool(mask.all() if mask.dtype == torch.bool else (mask == 0).all())
        if hides or kwargs.get("is_causal", False):
            raise RuntimeError("joins: an attention hides some of its own keys, which cannot be joined with others")
        came.add(module)
        sees, turned = how
        if turned and diagonal is not None:
            q, k = (_turned(x, offsets[shot] * diagonal, pairing) for x in (q, k))
        slots[shot] = (module, k, v)
        barrier.wait(_TIMEOUT)
        if any(slot[0] is not module for slot in slots):
            raise RuntimeError("forwards: they came to different attentions, expected the same modules in one order")
        seen = [slot for slot, visible in zip(slots, sees[shot].tolist(), strict=True) if visible]
        keys, values = (torch.cat([slot[i] for slot in seen], dim=-2) for i in (1, 2))
        barrier.wait(_TIMEOUT)
        options = {name: value for name, value in kwargs.items() if name in ("scale", "enable_gqa")}
        return attention(q, keys, values, **options)

    def run(shot: int) -> None:
        local.shot = shot
        try:
            with torch.set_grad_enabled(grad):
                results[shot] = forwards[shot]()
            slots[shot] = (None,)
            barrier.wait(_TIMEOUT)  # one that is at another attention now sees that this one came to its end
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    def enter(module: nn.Module, _: Any) -> None:
        local.module, local.calls = module, 0

    def leave(module: nn.Module, *_: Any) -> None:
        local.module, how = None, joins[module]
        if not isinstance(how, Join) and local.calls != len(how):
            raise RuntimeError(
                f"joins: got {len(how)} Joins for a {type(module).__name__} whose forward calls "
                f"scaled_dot_product_attention {local.calls} times, expected one for each call, or one Join for all"
            )

    handles = [
        handle
        for module in joins
        for handle in (module.register_forward_pre_hook(enter), module.register_forward_hook(leave))
    ]
    try:
        with mock.patch.object(F, "scaled_dot_product_attention", joined):
            threads = [threading.Thread(target=run, args=(shot,)) for shot in range(len(forwards))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        for handle in handles:
            handle.remove()
    if errors:
        cause = next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
        raise RuntimeError(f"forwards: {type(cause).__name__}: {cause}") from cause
    if missing := set(joins) - came:
        kinds = sorted({type(module).__name__ for module in missing})
        raise RuntimeError(
            f"joins: {len(missing)} modules ({', '.join(kinds)}) never called torch.nn.functional."
            "scaled_dot_product_attention, expected the modules that call it, by that name"
        )
    return results


def _turned(x: Tensor, angles: Tensor, pairing: str) -> Tensor:
    """Rotate ``[batch, heads, tokens, head_dim]`` by one angle for each pair of channels, by a 2 x 2 matrix."""
    pairs = angles.shape[-1]
    channel = torch.arange(2 * pairs)
    if pairing == "interleaved":
        first, second = channel[0::2], channel[1::2]
    elif pairing == "half":
        first, second = channel[:pairs], channel[pairs:]
    else:
        thirds = channel.view(3, 2, -1)
        first, second = thirds[:, 0].flatten(), thirds[:, 1].flatten()
    cos, sin = angles.double().cos()[:, None], angles.double().sin()[:, None]
    out = x.double().clone()
    out[..., first] = x[..., first].double() * cos - x[..., second].double() * sin
    out[..., second] = x[..., first].double() * sin + x[..., second].double() * cos
    return out.to(x.dtype)
