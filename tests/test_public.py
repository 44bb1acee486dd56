import importlib
import inspect
import pickle
import subprocess
import sys
import textwrap
from types import ModuleType

import pytest
import torch

import lct_core as lct
from lct_core.testing.tolerances import BOUNDS, error

PUBLIC = [
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
    "Sampling",
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


def test_the_public_surface_is_frozen():
    assert lct.__all__ == sorted(PUBLIC)


def test_nothing_else_looks_public():
    others = {name for name in vars(lct) if not name.startswith("_")} - set(PUBLIC)
    assert all(isinstance(getattr(lct, name), ModuleType) for name in others)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_name_resolves_and_says_what_it_means(name):
    thing = getattr(lct, name)
    doc = inspect.getdoc(thing)
    assert doc
    assert not doc.startswith(f"{name}(")  # what dataclasses and named tuples say by themselves
    if inspect.isclass(thing):
        assert thing.__module__.startswith("lct_core.")
        for method, member in vars(thing).items():
            if not method.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                assert inspect.getdoc(getattr(thing, method)), f"{name}.{method}"


def test_a_star_import_brings_the_public_names():
    space = {}
    exec("from lct_core import *", space)
    assert set(space) - {"__builtins__"} == set(PUBLIC)


def in_a_new_process(code):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_importing_the_package_loads_nothing_and_a_name_loads_what_it_needs():
    in_a_new_process(
        """
        import sys
        import lct_core as lct
        assert {name for name in sys.modules if name.startswith("lct_core")} == {"lct_core"}
        assert "torch" not in sys.modules
        assert {*lct.__all__} <= {*dir(lct)}
        assert lct.Layout is lct.Layout
        assert "Layout" in vars(lct)  # the second time, there is nothing to look up
        assert "lct_core.layout" in sys.modules and "lct_core.scene_model" not in sys.modules
        """
    )


@pytest.mark.parametrize(
    "imports", ["import lct_core.coordinates", "from lct_core.coordinates import Scheme", "import lct_core.scene_model"]
)
def test_a_public_name_is_not_the_module_that_is_spelt_alike(imports):
    in_a_new_process(
        f"""
        import lct_core as lct
        {imports}
        assert lct.coordinates.__name__ == "coordinates" and callable(lct.coordinates)
        import lct_core.coordinates
        from lct_core import coordinates
        assert lct.coordinates is coordinates and callable(coordinates)
        """
    )


@pytest.mark.parametrize("module", ["backbone", "engine", "generation", "plan", "plugins", "scene_model", "testing"])
def test_modules_are_there_without_another_import(module):
    in_a_new_process(
        f"""
        import lct_core as lct
        assert lct.{module}.__name__ == "lct_core.{module}"
        """
    )


def test_what_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"^module 'lct_core' has no attribute 'no_such_name'$"):
        _ = lct.no_such_name
    assert not hasattr(lct, "__wrapped__")
    with pytest.raises(ImportError, match="no_such_name"):
        from lct_core import no_such_name  # noqa: F401


@pytest.mark.parametrize("name", PUBLIC)
def test_names_are_those_of_their_modules(name):
    thing = getattr(lct, name)
    assert thing is getattr(importlib.import_module(lct._MODULES[name]), name)
    assert lct._MODULES.keys() == {*PUBLIC}
    if name != "hookimpl":  # pluggy's own
        assert pickle.loads(pickle.dumps(thing)) is thing


def test_the_pieces_one_by_one():
    shot = lct.Shot(text=12, grid=(4, 6, 6))
    layout = lct.Layout([[shot, shot], [shot]])
    assert layout.tokens == 3 * (12 + 4 * 6 * 6)
    assert layout.num_shots == 3

    where = lct.coordinates(layout, scheme="paper")
    assert where.shape == (layout.tokens, 3)
    assert torch.equal(where[: shot.tokens], where[2 * shot.tokens :])  # the second scene starts at 0 again

    plan = lct.context_causal(layout)
    assert plan.dense().shape == (layout.tokens, layout.tokens)
    assert (
        plan.pairs == plan.dense().sum() == 4 * shot.tokens**2
    )  # the first shot sees one, the second two, the third one

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, layout.tokens, 2, 16, generator=generator) for _ in range(3))
    out = lct.attend(q, k, v, plan, kernel="auto", scale=None)
    truth = lct.attend(q.double(), k.double(), v.double(), plan, kernel="reference", scale=16**-0.5)
    assert error(out, truth) <= BOUNDS[torch.float32]["kernel"].given(0.0)


def test_from_coordinates_to_rotated_queries():
    layout = lct.Layout([[lct.Shot(text=3, grid=(1, 2, 2))]])
    frequencies = lct.axis_frequencies((4, 6, 6))
    by = lct.rotation(lct.angles(lct.coordinates(layout), frequencies), pairing="interleaved")
    q = torch.randn(1, layout.tokens, 2, 16, generator=torch.Generator().manual_seed(0))
    turned = lct.rotate(q, by)
    assert torch.equal(turned[:, 0], q[:, 0])  # the first token stands at the origin
    assert not torch.equal(turned[:, 1:], q[:, 1:])


SURFACES = {
    "lct_core.script": {"SHOT_CUT", "Script", "ScriptShot", "parse_script", "read_script"},
    "lct_core.codec": {"Codec", "LinearCodec", "words"},
    "lct_core.data": {
        *("SceneFolders", "Skipped", "VideoScene", "read_image", "read_scene", "read_video"),
        *("scene_folders", "write_image", "write_scene", "write_video"),
    },
    "lct_core.cache": {
        *("Budget", "CachedShot", "ExpertCache", "KVCache", "Policy", "SiteSize", "Space", "StagedShots", "Storage"),
        *("Tier", "recency", "shot_bytes"),
    },
    "lct_core.cost": {
        *("Cost", "Live", "Meter", "Mode", "Pass", "Plan", "PlannedTake", "Throughput"),
        *("example", "fitted", "measure", "passes", "plan", "takes_of"),
    },
    "lct_core.generation": {
        *("Director", "Guidance", "History", "Sampling", "Step", "Take", "autoregressive", "causal"),
        *("conditional", "euler", "joint", "negative_texts", "recent", "schedule", "start_scene"),
    },
    "lct_core.routing": {"Plans", "Router", "Tally", "TopK", "attend_routed"},
    "lct_core.session": {"Book", "BranchState", "Session", "SessionTake", "Settings", "ShotRow"},
    "lct_core.training": {
        *("CHECKPOINT", "METRICS", "EMA", "Example", "Report", "Stage", "Training", "TrainingRow", "adamw", "cosine"),
        *("load_checkpoint", "paper_stages", "sample_row", "save_checkpoint", "scene_examples", "single_shots"),
        *("to_row", "train", "tune"),
    },
}


@pytest.mark.parametrize("module", SURFACES)
def test_the_other_surfaces_are_frozen_too(module):
    found = importlib.import_module(module)
    assert set(found.__all__) == SURFACES[module]
    assert all(hasattr(found, name) for name in found.__all__)
