"""The suite holds for the library's own model, and every invariant of it reports what breaks it."""

import copy
from functools import cache

import pytest
import torch

import lct_core as lct
from lct_backbones.mmdit import MMDiT, MMDiTBackbone, tiny
from lct_core import patterns, scene_model
from lct_core.backbone import adapter as backbone
from lct_core.cache import kv_cache
from lct_core.engine import call, dispatch, joining
from lct_core.plan import AttentionPlan, Segment
from lct_core.testing.conformance import Finding, conformance
from lct_core.testing.tolerances import BOUNDS, Bound, error

SCHEMES = ("anchored", "paper")
DTYPES = (torch.float32, torch.bfloat16)
PATTERNS = ("bidirectional", "context_causal")
COPIES = ("a deep copy", "a pickle round trip")
INVARIANTS = {
    1: {
        "the model's own forward is untouched",
        "same state_dict keys and parameter count",
        "shape and dtype of the base model's output",
        "one shot equals the base model",
    },
    2: {"equals the dense-mask definition", "shots see one another (else the rest proves nothing)"},
    3: {"a shot does not depend on later shots"},
    4: {
        "cached equals uncached",
        "several shots behind a history",
        "cached behind a global shot equals uncached",
    },
    5: {"packing changes no scene", "shots of equal shape run as a batch equal shots run one by one"},
    6: {"gradients with checkpointing equal those without"},
    7: {"moving a whole scene changes nothing", "moving a cached history and what follows changes nothing"},
    8: {"weights that change are the weights that run"} | {f"{copy} {does}" for copy in COPIES
        for does in ("runs its own weights", "runs the weights loaded into it")},
    9: {f"refuses {what}" for what in (
        "an unknown kernel", "an unknown scheme", "an unknown pattern", "a noise level above 1",
        "a noise level too few", "latents with a channel too many", "text of another width",
        "an unknown extra", "an empty scene")},
}  # fmt: skip
BASE = {"one shot equals the base model", "weights that change are the weights that run"}
CASES = [
    pytest.param(scheme, dtype, invariant, name, id=f"{scheme}-{str(dtype).removeprefix('torch.')}-{invariant}: {name}")
    for scheme in SCHEMES
    for dtype in DTYPES
    for invariant, names in INVARIANTS.items()
    for name in sorted(names)
    if scheme == "anchored" or name not in BASE  # the paper's coordinates change the base model
]


@cache
def measured(scheme, dtype):
    return list(conformance(tiny, schemes=[scheme], dtypes=[dtype]))


@pytest.mark.internals
@pytest.mark.parametrize(("scheme", "dtype", "invariant", "name"), CASES)
def test_the_mmdit_conforms(scheme, dtype, invariant, name):
    found = [finding for finding in measured(scheme, dtype) if (finding.invariant, finding.name) == (invariant, name)]
    assert found, "the suite no longer measures this"
    for finding in found:
        assert finding.holds, finding


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_measured_that_is_not_listed_here(scheme, dtype):
    named = {(case.values[2], case.values[3]) for case in CASES if case.values[:2] == (scheme, dtype)}
    assert {(finding.invariant, finding.name) for finding in measured(scheme, dtype)} == named


@pytest.mark.parametrize("name", ["equals the dense-mask definition", "packing changes no scene",
                                  "moving a whole scene changes nothing",
                                  "gradients with checkpointing equal those without"])  # fmt: skip
def test_both_patterns_are_measured(name):
    cases = [finding.case for finding in measured("anchored", torch.float32) if finding.name == name]
    assert cases == [f"anchored, {pattern}, float32" for pattern in PATTERNS]


def test_by_default_everything_is_measured():
    found = {finding.case.split(", ")[0] + finding.case.split(", ")[-1] for finding in conformance(tiny)}
    assert found == {"anchoredfloat32", "anchoredbfloat16", "paperfloat32", "paperbfloat16"}


def test_the_model_is_left_as_it_was():
    model = tiny()
    weights = copy.deepcopy(model.state_dict())
    list(conformance(lambda: model, schemes=["anchored"], dtypes=[torch.float32]))
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


# It can fail.


def broken(factory=tiny, *, dtype=torch.float32, scheme="anchored"):
    """Invariant and name of everything that does not hold."""
    findings = conformance(factory, schemes=[scheme], dtypes=[dtype])
    return {(finding.invariant, finding.name) for finding in findings if not finding.holds}


def invariants(found):
    return {invariant for invariant, _ in found}


class Adapter(MMDiTBackbone):
    """The MMDiT's adapter, to be broken."""

    def __init__(self, model=None):
        super().__init__(tiny() if model is None else model)


def test_this_adapter_is_sound_until_it_is_broken():
    assert not broken(Adapter)


class AcrossShots(Adapter):
    """Keeps what the last call attended to, and lets it leak into the next shot."""

    last = None

    def finish(self, block, site, state, attended, aux):
        leaked = attended if self.last is None else attended + 0.1 * self.last.mean(1, keepdim=True)
        self.last = attended.detach()
        return super().finish(block, site, state, leaked, aux)


def test_state_across_shots_is_reported():
    assert {1, 2, 3, 4, 5} <= invariants(broken(AcrossShots))


class LeaksBackwards(Adapter):
    """Modulates every shot by the mean level of all shots encoded so far, later calls' included."""

    def encode(self, inputs, timestep):
        self.seen = [*getattr(self, "seen", []), timestep]
        return super().encode(inputs, torch.stack(self.seen).mean(0))


def test_a_model_that_changes_from_call_to_call_is_reported():
    assert {(1, "one shot equals the base model"), (3, "a shot does not depend on later shots")} <= broken(
        LeaksBackwards
    )


class CoarseAngles(Adapter):
    """Angles rounded to bfloat16: the position of a token in a long scene is lost."""

    def rope(self, coords):
        return super().rope(coords).bfloat16().double()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_coarse_angles_are_reported(scheme):
    found = broken(CoarseAngles, scheme=scheme)
    assert (7, "moving a whole scene changes nothing") in found
    assert ((1, "one shot equals the base model") in found) == (scheme == "anchored")


class HalfAngles(Adapter):
    """Angles in bfloat16."""

    def rope(self, coords):
        return super().rope(coords).bfloat16()


def test_angles_in_half_precision_are_refused():
    words = "raised ValueError: angles: got torch.bfloat16, expected torch.float32 or torch.float64"
    assert {invariant for invariant, name in broken(HalfAngles) if name.startswith(words)} >= {1, 2, 3, 4, 5, 6, 7, 8}


class Table(Adapter):
    """A table of positions that a long scene runs past."""

    def rope(self, coords):
        return super().rope(coords.clamp(max=16))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_angles_that_are_not_linear_are_reported(scheme):
    assert broken(Table, scheme=scheme) == {(7, name) for name in INVARIANTS[7]}


class BlindAxis(Adapter):
    """Turns by frames alone, unlike the model."""

    def rope(self, coords):
        return super().rope(coords * torch.tensor([1.0, 0.0, 0.0]))


def test_an_ignored_axis_is_reported():
    assert (1, "one shot equals the base model") in broken(BlindAxis)


class OtherDtype(Adapter):
    """Hands out float32 whatever the model's own dtype, or the other way round."""

    def unpatchify(self, tokens, shot):
        out = super().unpatchify(tokens, shot)
        return out.float() if out.dtype == torch.bfloat16 else out.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_another_dtype_is_reported(scheme, dtype):
    found = broken(OtherDtype, scheme=scheme, dtype=dtype)
    assert found == {(1, "shape and dtype of the base model's output")}


class OtherShape(Adapter):
    """Hands out tokens as they are."""

    def unpatchify(self, tokens, shot):
        return tokens


def test_another_shape_is_reported():
    first = next(finding for finding in conformance(OtherShape) if not finding.holds)
    assert (first.invariant, first.name) == (1, "shape and dtype of the base model's output")


class AddsKey(Adapter):
    """Adds a buffer: another key, and no parameter more."""

    @property
    def blocks(self):
        self.model.register_buffer("table", torch.zeros(3))
        return super().blocks


class AddsParameters(Adapter):
    """Makes a parameter larger: more parameters, and no other key."""

    def __init__(self):
        super().__init__()
        self.model.spare = torch.nn.Parameter(torch.zeros(1))

    @property
    def blocks(self):
        self.model.spare = torch.nn.Parameter(torch.zeros(2))
        return super().blocks


@pytest.mark.parametrize("adapter", [AddsKey, AddsParameters])
def test_an_adapter_that_adds_to_the_model_is_reported(adapter):
    assert broken(adapter) == {(1, "same state_dict keys and parameter count")}


class Meddles(Adapter):
    """Changes the model that it adapts."""

    @property
    def blocks(self):
        self.model.theta = 100.0
        return super().blocks


def test_an_adapter_that_changes_its_model_is_reported():
    assert (1, "the model's own forward is untouched") in broken(Meddles)


def test_zero_initialised_gates_are_reported():
    """AdaLN-zero: nothing passes from shot to shot, so that everything would hold and prove nothing."""

    def untrained():
        torch.manual_seed(0)
        model = MMDiT(channels=4, text_width=16, width=48, depth=2, heads=2)
        torch.nn.init.normal_(model.video_out.weight)  # the outputs are not zero, the gates are
        return model

    for scheme in SCHEMES:
        assert broken(untrained, scheme=scheme) == {(2, "shots see one another (else the rest proves nothing)")}


class Burst(Adapter):
    def head(self, state):
        return super().head(state) / 0


def test_outputs_that_are_not_finite_are_reported():

    assert {1, 2, 3, 4, 5, 7} <= invariants(broken(Burst))


def off_by_one(layout):
    """A causal plan in which a shot sees the first token of the next one too."""
    plan = patterns.context_causal(layout)
    segments = [Segment(q, tuple((k.start, min(k.stop + 1, layout.tokens)) for k in keys)) for q, keys in plan.segments]
    return AttentionPlan(plan.queries, plan.keys, tuple(segments))


def test_a_plan_with_an_off_by_one_is_reported(monkeypatch):
    monkeypatch.setitem(patterns.PATTERNS, "context_causal", off_by_one)
    found = broken()
    assert {(2, "equals the dense-mask definition"), (3, "a shot does not depend on later shots")} <= found
    assert {(4, "cached equals uncached"), (5, "packing changes no scene")} <= found


def test_scenes_that_see_one_another_are_reported(monkeypatch):
    whole = lambda layout: patterns.bidirectional(lct.Layout([layout.shots], layout.text_first))  # noqa: E731
    monkeypatch.setitem(patterns.PATTERNS, "bidirectional", whole)
    assert broken() == {(5, "packing changes no scene")}


def test_a_cache_that_forgets_is_reported(monkeypatch):
    write = kv_cache.write

    def forgetful(here, key, space, k, v):
        keys, values = write(here, key, space, k, v)
        return keys, torch.cat([torch.zeros_like(values[:, : -v.shape[1]]), v], 1)

    monkeypatch.setattr(kv_cache, "write", forgetful)
    assert broken() == {(4, name) for name in INVARIANTS[4]}


def test_a_cached_shot_that_starts_elsewhere_is_reported(monkeypatch):
    monkeypatch.setattr(lct.KVCache, "end", property(lambda self: sum(e.extent for e in self.shots[1:])))
    assert broken() == {(4, name) for name in INVARIANTS[4]} | {(7, next(n for n in INVARIANTS[7] if "cached" in n))}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_shot_without_its_place_is_reported(monkeypatch, dtype):
    """All shots at the origin: the order of shots is lost, yet all is still relative."""
    monkeypatch.setattr(joining, "measured_extent", lambda coords, unit: 0)
    assert broken(dtype=dtype) == {(2, "equals the dense-mask definition")}


def test_a_rotation_in_bfloat16_is_reported(monkeypatch):
    rotate = backbone.rotate
    monkeypatch.setattr(
        backbone,
        "rotate",
        lambda x, by: rotate(x, by._replace(cos=by.cos.bfloat16().float(), sin=by.sin.bfloat16().float())),
    )
    assert {1, 2, 7} <= invariants(broken())
    assert (2, "equals the dense-mask definition") in broken(scheme="paper")


def test_checkpointing_that_cuts_the_graph_is_reported(monkeypatch):
    def cut(function, *args, use_reentrant):
        return [{name: x.detach() for name, x in new.items()} for new in function(*args)]

    monkeypatch.setattr(call, "checkpoint", cut)
    assert broken() == {(6, "gradients with checkpointing equal those without")}


ORIGINALS = {}


def original(key):
    return ORIGINALS[key]


class Closure(dispatch.Dispatch):
    """Runs the module that it was made for, also in a copy."""

    def __init__(self, module):
        super().__init__(module)
        self.key = len(ORIGINALS)
        ORIGINALS[self.key] = self

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        return original, (self.key,)


def test_closures_on_the_originals_weights_are_reported(monkeypatch):
    monkeypatch.setattr(dispatch, "Dispatch", Closure)
    for scheme in SCHEMES:
        assert broken(scheme=scheme) == {(8, f"{copy} runs its own weights") for copy in COPIES}


class Frozen(Adapter):
    """Keeps the weights it was made with, fused or sharded for example."""

    def __init__(self):
        super().__init__()
        self.last = copy.deepcopy(self.model.video_out)

    def head(self, state):
        loaded, self.model.video_out = self.model.video_out, self.last
        out = super().head(state)
        self.model.video_out = loaded
        return out


def test_weights_kept_aside_are_reported():
    found = broken(Frozen)
    assert (8, "weights that change are the weights that run") in found
    assert {invariant for invariant, _ in found} <= {6, 8}  # and training does not reach them


def test_an_engine_that_takes_anything_is_reported(monkeypatch):
    monkeypatch.setattr(call, "named", lambda pattern: patterns.PATTERNS.get(pattern, patterns.bidirectional))
    assert broken() == {(9, "refuses an unknown pattern")}
    monkeypatch.setattr(scene_model, "noise_levels", lambda t, roles, batch: torch.zeros(batch, len(roles)))
    assert {(9, "refuses a noise level above 1"), (9, "refuses a noise level too few")} <= broken()


class Takes(Adapter):
    def shot(self, inputs):
        latents, text = inputs.latents[:, :4], inputs.text[:, :, :16]
        return super().shot(lct.ShotInput(latents=latents, text=text, role=inputs.role))

    def encode(self, inputs, timestep):
        return super().encode(lct.ShotInput(latents=inputs.latents[:, :4], text=inputs.text[:, :, :16]), timestep)


def test_an_adapter_that_takes_anything_is_reported():
    taken = ("latents with a channel too many", "text of another width", "an unknown extra")
    assert broken(Takes) == {(9, f"refuses {what}") for what in taken}


# The measure itself.


def test_error_is_relative_to_the_largest_expected_value():
    assert error(torch.tensor([1.0, -4.5]), torch.tensor([1.0, -4.0])) == 0.125
    assert error(torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64)) == 0
    assert error(torch.zeros(2), torch.zeros(2)) == 0
    assert error(torch.ones(2), torch.zeros(2)) > 1e30


@pytest.mark.parametrize(
    "got", [torch.tensor([float("nan"), 1.0]), torch.tensor([float("inf"), 1.0]), torch.ones(3), torch.ones(1)]
)
def test_error_is_infinite_for_what_cannot_be_compared(got):
    assert error(got, torch.ones(2)) == float("inf")


def test_a_finding_holds_within_its_bound_alone():
    assert Finding(1, "", "", error=1.0, bound=1.0).holds
    assert not Finding(1, "", "", error=1.0 + 1e-12, bound=1.0).holds
    assert not Finding(1, "", "", error=float("nan"), bound=1.0).holds


def test_a_bound_is_the_larger_of_its_two_parts():
    assert Bound(absolute=1.0, of_own=2.0).given(0.25) == 1.0
    assert Bound(absolute=1.0, of_own=2.0).given(2.0) == 4.0
    assert Bound().given(5.0) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_must_be_exact_is(dtype):
    exact = {name for name, bound in BOUNDS[dtype].items() if bound == Bound()}
    of_one_shot = {"one shot", "one shot, changed"} if dtype == torch.float32 else set()
    assert exact == {"causal", "packed", "copies"} | of_one_shot
