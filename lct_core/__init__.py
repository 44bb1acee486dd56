"""Long Context Tuning: the pieces that make a scene model of a single-shot video diffusion transformer.

``retrofit`` a model, or use the pieces one by one: a ``Layout`` says which token belongs to which shot; coordinates,
attention plans (``bidirectional``, ``context_causal``, ...) and packing all derive from it.
"""

from lct_core.attention import attend
from lct_core.backbone.adapter import QKV, Backbone, Site, State
from lct_core.backbone.inputs import ShotInput, collate_shots
from lct_core.backbone.traits import Extra, Traits
from lct_core.cache import Budget, CachedShot, KVCache
from lct_core.cache.expert_cache import ExpertCache
from lct_core.coordinates import coordinates
from lct_core.experts import Experts
from lct_core.layout import Layout, Range, Shot
from lct_core.losses import SceneLoss, scene_loss, tuning_loss
from lct_core.noise import (
    condition_levels,
    joint_levels,
    sample_levels,
    sample_shot_run,
    shot_noise,
    substitute_single_frames,
)
from lct_core.packing import pack, plan_rows, unpack
from lct_core.paths import RectifiedFlow, VariancePreserving
from lct_core.patterns import (
    bidirectional,
    context_causal,
    first_frames,
    own_and_global_text,
    own_shot,
    own_text,
    seen_text,
    selected_history,
)
from lct_core.plan import AttentionPlan, Segment, Varlen
from lct_core.plugins.hooks import BackboneSpec, Kernel, KernelRequest, KernelSpec, PluginError, Support, hookimpl
from lct_core.plugins.registry import Registry, registry
from lct_core.rope import Rotation, angles, axis_frequencies, move, rotate, rotation
from lct_core.scene_model import SceneModel, retrofit

__all__ = [
    "QKV",
    "AttentionPlan",
    "Backbone",
    "BackboneSpec",
    "Budget",
    "CachedShot",
    "ExpertCache",
    "Experts",
    "Extra",
    "KVCache",
    "Kernel",
    "KernelRequest",
    "KernelSpec",
    "Layout",
    "PluginError",
    "Range",
    "RectifiedFlow",
    "Registry",
    "Rotation",
    "SceneLoss",
    "SceneModel",
    "Segment",
    "Shot",
    "ShotInput",
    "Site",
    "State",
    "Support",
    "Traits",
    "VariancePreserving",
    "Varlen",
    "angles",
    "attend",
    "axis_frequencies",
    "bidirectional",
    "collate_shots",
    "condition_levels",
    "context_causal",
    "coordinates",
    "first_frames",
    "hookimpl",
    "joint_levels",
    "move",
    "own_and_global_text",
    "own_shot",
    "own_text",
    "pack",
    "plan_rows",
    "registry",
    "retrofit",
    "rotate",
    "rotation",
    "sample_levels",
    "sample_shot_run",
    "scene_loss",
    "seen_text",
    "selected_history",
    "shot_noise",
    "substitute_single_frames",
    "tuning_loss",
    "unpack",
]
