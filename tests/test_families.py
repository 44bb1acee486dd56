"""Every backbone family: its real classes, at tiny random sizes, against their own forward and against the oracle."""

import re
from dataclasses import replace
from importlib import import_module
from itertools import accumulate
from pathlib import Path

import diffusers
import pytest
import torch
from families.case import Case

from lct_core import KVCache, ShotInput, VariancePreserving, registry, retrofit
from lct_core.testing.conformance import conformance
from lct_core.testing.oracle import Join, lockstep
from lct_core.testing.tolerances import BOUNDS, error

diffusers.logging.set_verbosity_error()  # of casts to bfloat16 that its own loader would do otherwise

FAMILIES = sorted(path.stem for path in (Path(__file__).parent / "families").glob("[!_]*.py") if path.stem != "case")
CASES = [case for family in FAMILIES for case in import_module(f"families.{family}").CASES]
FLOAT32 = BOUNDS[torch.float32]

every_case = pytest.mark.parametrize("case", CASES, ids=str)


class Scene:
    """Three unequal shots of a case, a batch of two, each at a noise level of its own."""

    def __init__(self, case: Case, *, seed: int = 0, prompt: bool = False) -> None:
        self.case = case
        self.adapter = retrofit(case.model()).adapter  # the scene's own: inputs are drawn by it, outputs are not
        generator = torch.Generator().manual_seed(seed)
        drawn = [self.adapter.example(s, batch=2, generator=generator, dtype=torch.float32) for s in case.shots]
        self.shots = [replace(s, extras={n: x for n, x in s.extras.items() if n not in case.without}) for s in drawn]
        self.t = torch.rand(2, len(self.shots), generator=generator)
        if prompt:
            text = torch.randn(2, 4, self.adapter.traits.text_width, generator=generator)
            self.shots = [ShotInput(text=text, role="global"), *self.shots]
            self.t = torch.cat([torch.zeros(2, 1), self.t], dim=1)

    def alone(self, model, i):
        """The model's own forward on one shot; a global prompt gets some latents, which nobody sees."""
        shot = self.shots[i]
        if shot.role == "global":
            shot = replace(self.shots[1], text=shot.text)
        adapter = type(self.adapter)(model)
        return adapter.single_shot(adapter.prepare(shot), adapter.traits.timestep(self.t[:, i]))

    def oracle(self, *, pattern="bidirectional", text="own"):
        """What the unmodified forwards give where their attentions are joined."""
        model = self.case.model()
        shots = [self.adapter.prepare(s) if s.role == "shot" else s for s in self.shots]
        steps = [self.case.steps(s, self.adapter.shot(s)) if s.role == "shot" else 0 for s in shots]
        place = torch.arange(len(shots))
        own, prompt = place[:, None] == place, torch.tensor([s.role == "global" for s in shots])
        earlier = torch.ones_like(own) if pattern == "bidirectional" else place <= place[:, None]
        joins = {m: Join(own | (earlier & ~prompt)) for m in self.case.joined(model)}
        sees = {"own": own, "own_and_global": own | prompt, "all": earlier | prompt}[text]
        joins |= {m: Join(sees, turned=False) for m in (self.case.text or (lambda _: ()))(model)}
        outputs = lockstep(
            [lambda i=i: self.alone(model, i) for i in range(len(shots))],
            joins,
            offsets=[*accumulate(steps[:-1], initial=0)],
            diagonal=self.case.diagonal,
            pairing=self.case.pairing,
        )
        return [None if s.role == "global" else out for s, out in zip(shots, outputs, strict=True)]


def worst(got, expected):
    assert [g is None for g in got] == [x is None for x in expected]
    return max(error(g, x) for g, x in zip(got, expected, strict=True) if x is not None)


@every_case
@torch.no_grad()
def test_one_shot_is_the_models_own_forward(case):
    scene, model = Scene(case), retrofit(case.model())
    own = case.model()
    for i, shot in enumerate(scene.shots):
        (out,), expected = model([shot], scene.t[:, i : i + 1]), scene.alone(own, i)
        assert error(out, expected) <= FLOAT32["masked" if case.masks_padding else "one shot"].absolute
        assert torch.equal(scene.alone(model.backbone, i), expected)  # called as before, it does as before


@every_case
@pytest.mark.parametrize("pattern", ["bidirectional", "context_causal"])
@torch.no_grad()
def test_many_shots_are_the_joined_forwards(case, pattern):
    scene = Scene(case)
    got = retrofit(case.model())(scene.shots, scene.t, pattern=pattern)
    assert worst(got, scene.oracle(pattern=pattern)) <= FLOAT32["definition"].absolute


@every_case
@torch.no_grad()
def test_shot_after_shot_with_a_cache_is_the_joined_forwards(case):
    scene, model, cache = Scene(case), retrofit(case.model()), KVCache()
    got = []
    for i, shot in enumerate(scene.shots):
        got += model([shot], scene.t[:, i : i + 1], pattern="context_causal", cache=cache)
        cache.append(i)
    assert worst(got, scene.oracle(pattern="context_causal")) <= FLOAT32["cached"].absolute


@pytest.mark.parametrize("case", [case for case in CASES if case.text], ids=str)
@pytest.mark.parametrize("pattern", ["bidirectional", "context_causal"])
@pytest.mark.parametrize("text", ["own_and_global", "all"])
@torch.no_grad()
def test_prompts_of_other_shots_are_heard_in_cross_attention(case, pattern, text):
    scene = Scene(case, prompt=True)
    model = retrofit(case.model(), text=text)
    expected = scene.oracle(pattern=pattern, text=text)
    assert worst(model(scene.shots, scene.t, pattern=pattern), expected) <= FLOAT32["definition"].absolute
    if pattern == "context_causal":
        cache, got = KVCache(), []
        for i, shot in enumerate(scene.shots):
            got += model([shot], scene.t[:, i : i + 1], pattern=pattern, cache=cache)
            cache.append(i)
        assert worst(got, expected) <= FLOAT32["cached"].absolute


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_conformance(case, dtype):
    broken = [f for f in conformance(case.model, dtypes=[dtype]) if not f.holds]
    assert not broken, "\n".join(map(str, broken))


def described(traits):
    """What a row of the support table must say of a model: text, RoPE or none, path, timesteps."""
    clean, noise = traits.timesteps
    vp = isinstance(traits.path, VariancePreserving)
    return traits.text, traits.pairing is not None, vp, getattr(traits.path, "toward_data", False), clean, noise


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_of_the_support_table_is_true(family):
    cases = import_module(f"families.{family}").CASES
    rows = set()
    for row in registry().backbones[family].support:
        clean, noise = re.fullmatch(r"(-?\d+)(?: \(clamped to 0\))? to (-?\d+)", row.time).groups()
        rope = "RoPE" in row.positions.replace("no RoPE", "") or "the same" in row.positions
        vp, toward_data = "variance preserving" in row.path, "toward the data" in row.path
        assert vp != row.path.startswith("rectified flow, velocity")
        rows.add((row.text, rope, vp, toward_data, float(clean), float(noise)))
    assert rows == {described(registry().adapter(case.model()).traits) for case in cases}
    adapter = registry().backbones[family].adapter
    assert all(
        f"{type(a).__module__}:{type(a).__qualname__}" == adapter for a in [registry().adapter(cases[0].model())]
    )


def test_every_family_is_tested():
    assert set(FAMILIES) == set(registry().backbones) - {"mmdit"}  # which has tests of its own
