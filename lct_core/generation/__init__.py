"""Generation: takes over one plain loop (paper, Fig. 4 and A.2).

A :class:`Director` makes a scene take by take; every mode is a list of takes. They get a scene model and a scene whose
latents are the noise that each shot starts from, and return what became of it.
"""

from lct_core.generation.autoregressive import autoregressive
from lct_core.generation.causal import causal
from lct_core.generation.conditional import conditional
from lct_core.generation.director import Director
from lct_core.generation.euler import Step, euler, schedule
from lct_core.generation.guidance import Guidance
from lct_core.generation.history import History, recent
from lct_core.generation.joint import joint
from lct_core.generation.scene import negative_texts, start_scene
from lct_core.generation.takes import Take

__all__ = [
    "Director",
    "Guidance",
    "History",
    "Step",
    "Take",
    "autoregressive",
    "causal",
    "conditional",
    "euler",
    "joint",
    "negative_texts",
    "recent",
    "schedule",
    "start_scene",
]
