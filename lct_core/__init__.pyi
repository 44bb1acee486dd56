"""What ``lct_core`` hands on, and where it is: read by type checkers, and by the package itself when it is imported."""

from lct_core.attention import attend as attend
from lct_core.backbone import (
    QKV as QKV,
    Backbone as Backbone,
    Extra as Extra,
    ShotInput as ShotInput,
    Site as Site,
    State as State,
    Traits as Traits,
    collate_shots as collate_shots,
)
from lct_core.cache import Budget as Budget, CachedShot as CachedShot, ExpertCache as ExpertCache, KVCache as KVCache
from lct_core.coordinates import coordinates as coordinates
from lct_core.experts import Experts as Experts
from lct_core.generation import Sampling as Sampling
from lct_core.layout import Layout as Layout, Range as Range, Shot as Shot
from lct_core.losses import SceneLoss as SceneLoss, scene_loss as scene_loss, tuning_loss as tuning_loss
from lct_core.noise import (
    condition_levels as condition_levels,
    joint_levels as joint_levels,
    sample_levels as sample_levels,
    sample_shot_run as sample_shot_run,
    shot_noise as shot_noise,
    substitute_single_frames as substitute_single_frames,
)
from lct_core.packing import pack as pack, plan_rows as plan_rows, unpack as unpack
from lct_core.paths import RectifiedFlow as RectifiedFlow, VariancePreserving as VariancePreserving
from lct_core.patterns import (
    bidirectional as bidirectional,
    context_causal as context_causal,
    first_frames as first_frames,
    own_and_global_text as own_and_global_text,
    own_shot as own_shot,
    own_text as own_text,
    seen_text as seen_text,
    selected_history as selected_history,
)
from lct_core.plan import AttentionPlan as AttentionPlan, Segment as Segment, Varlen as Varlen
from lct_core.plugins import (
    BackboneSpec as BackboneSpec,
    Kernel as Kernel,
    KernelRequest as KernelRequest,
    KernelSpec as KernelSpec,
    PluginError as PluginError,
    Registry as Registry,
    Support as Support,
    hookimpl as hookimpl,
    registry as registry,
)
from lct_core.rope import (
    Rotation as Rotation,
    angles as angles,
    axis_frequencies as axis_frequencies,
    move as move,
    rotate as rotate,
    rotation as rotation,
)
from lct_core.scene_model import SceneModel as SceneModel, retrofit as retrofit
