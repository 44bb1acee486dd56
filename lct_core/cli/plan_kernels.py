"""The kernels that serve a scene which ``lct plan`` plans."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from lct_core.cli.kernel_rows import auto_choice, kernel_rows
from lct_core.cli.plan_subject import Subject
from lct_core.cost import Mode
from lct_core.layout import Layout
from lct_core.patterns import PATTERNS, Pattern, context_causal
from lct_core.plan import AttentionPlan
from lct_core.plugins import KernelRequest, registry


class Kernels(NamedTuple):
    """The kernels of a mode.

    Args:
        chosen: Those that run, with what was asked for: a name, or ``auto``.
        serving: All that serve it.
    """

    chosen: Mapping[str, str]
    serving: Sequence[str]


def kernels_of(mode: Mode, asked: Sequence[str], subject: Subject, window: int, device: torch.device) -> Kernels:
    """The kernels for a mode's last take.

    Raises:
        ValueError: for an unknown one, and one that is asked for by name and refuses.
    """
    adapter = subject.meter.adapter
    attending = Layout([subject.scene], adapter.traits.text_first)
    attending = attending if adapter.traits.text == "joint" else attending.video_only
    request = KernelRequest(
        _last_plan(mode, attending, window, PATTERNS[subject.pattern]),
        device,
        subject.meter.dtype,
        adapter.traits.heads,
        adapter.traits.kv_heads,
        adapter.traits.head_dim,
        False,
    )
    rows = kernel_rows(registry(), request)
    for name in asked:
        if registry().check_kernel(name) != "auto":
            registry().kernel(name, request)  # refuses
    auto = auto_choice(rows) or "none: all refuse"
    chosen = {auto if name == "auto" else name: name for name in asked}
    return Kernels(chosen, [row.name for row in rows if not row.refusals])


def _last_plan(mode: Mode, layout: Layout, window: int, pattern: Pattern) -> AttentionPlan:
    if mode in ("joint", "conditional"):
        return pattern(layout)
    first = [shot for shot in layout.shots if shot.role == "global"]
    seen = Layout([[*first, *[s for s in layout.shots if s.role == "shot"][-window:]]], layout.text_first)
    return context_causal(seen).rows(seen.spans[-1]) if mode == "causal" else pattern(seen)
