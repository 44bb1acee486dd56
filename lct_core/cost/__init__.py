"""What a generation takes before it is run: operations, the cache's bytes, memory, time.

``passes.py`` says what is run, ``meter.py`` what it costs, ``cached.py`` what a cache holds meanwhile,
``throughput.py`` how fast a device is, and ``plan.py`` all of it.
"""

from lct_core.cost.live import Live
from lct_core.cost.meter import Cost, Meter, example
from lct_core.cost.passes import Pass, passes
from lct_core.cost.plan import Plan, PlannedTake, plan
from lct_core.cost.throughput import Throughput, fitted, measure
from lct_core.generation.takes import Mode, takes_of

__all__ = [
    "Cost",
    "Live",
    "Meter",
    "Mode",
    "Pass",
    "Plan",
    "PlannedTake",
    "Throughput",
    "example",
    "fitted",
    "measure",
    "passes",
    "plan",
    "takes_of",
]
