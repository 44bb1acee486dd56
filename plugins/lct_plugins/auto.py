"""``kernel="auto"``: the order in which kernels are tried, by hardware and by how a plan's key ranges lie.

The first that does not refuse is taken, once for each plan. After those of a row comes torch's SDPA, one dense call per
query range, which serves everything. What is not in a row has to be asked for by name there.

Nothing here was measured for this library on a GPU yet: the rows follow published rates (FlashAttention-3,
arXiv 2407.08608; MagiAttention's kernel benchmark; PyTorch's defaults), and no kernel that has none is in them. They
change with results in ``benchmarks/results``, and with nothing else. No row depends on sizes or on gradients, since no
result asks for it; a rank could, it is a function of the whole request.
"""

from collections.abc import Callable
from typing import NamedTuple, get_args

from lct_core import KernelRequest
from lct_core.plan import Form

_SDPA = 100  # its rank, in the core

_ANY: tuple[Form, ...] = get_args(Form)


class Preference(NamedTuple):
    """Kernels that are tried before SDPA: a row of the table.

    Args:
        hardware: ``KernelRequest.hardware``, any of these.
        forms: ``AttentionPlan.form``, any of these.
        order: Names of kernels, best first.
        why: What the order rests on.
    """

    hardware: tuple[str, ...]
    forms: tuple[Form, ...]
    order: tuple[str, ...]
    why: str


TABLE = (
    Preference(
        ("sm_90",),
        _ANY,
        ("flash3",),
        "on Hopper, FA3's published rates of dense and packed attention are the highest; none is published for its "
        "calls on overlapping ranges. Without it SDPA, which is cuDNN there, is ahead of FA2 and FlexAttention",
    ),
    Preference(
        ("sm_80", "sm_86", "sm_87", "sm_89"),
        ("packed", "overlapping", "gathered"),
        ("flash2", "flash-torch"),
        "the kernel is the one that SDPA runs, in one launch for all shots",
    ),
)


def rank(name: str) -> Callable[[KernelRequest], int | None]:
    """A kernel's place in the table, as its spec announces it."""

    def place(request: KernelRequest) -> int | None:
        row = next((r for r in TABLE if request.hardware in r.hardware and request.plan.form in r.forms), None)
        return None if row is None or name not in row.order else _SDPA - len(row.order) + row.order.index(name)

    return place


def markdown() -> str:
    """The table, as the documentation has it."""
    rows = [
        f"| {', '.join(row.hardware)} | {', '.join(row.forms)} | {', '.join(row.order)}, sdpa | {row.why} |"
        for row in TABLE
    ]
    rest = "| anything else | any | sdpa | it serves every device and dtype |"
    return "\n".join(["| hardware | form of the plan | order | why |", "|---|---|---|---|", *rows, rest])
