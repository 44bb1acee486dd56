"""Generation: takes over one plain loop (paper, Fig. 4 and A.2).

A :class:`Director` makes a scene take by take; every mode is a list of takes. They get a scene model and a scene whose
latents are the noise that each shot starts from, and return what became of it.
"""

from lct_core.generation.director import Director
from lct_core.generation.euler import Step, euler, schedule
from lct_core.generation.guidance import Guidance
from lct_core.generation.history import History, recent
from lct_core.generation.modes import autoregressive, causal, conditional, joint
from lct_core.generation.sampling import Sampling
from lct_core.generation.scene import negative_texts, start_scene
from lct_core.generation.takes import Take

__all__ = [
    "Director",
    "Guidance",
    "History",
    "Sampling",
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
