"""Every backbone family: its real classes, at tiny random sizes, against their own forward and against the oracle."""

import re
from dataclasses import replace
from importlib import import_module
from itertools import accumulate, groupby
from pathlib import Path

import diffusers
import pytest
import torch

from lct_core import KVCache, ShotInput, VariancePreserving, registry, retrofit
from lct_core.testing.conformance import conformance
from lct_core.testing.oracle import Join, lockstep
from lct_core.testing.tolerances import BOUNDS, error
from tests.backbones.families.case import Case

diffusers.logging.set_verbosity_error()  # of casts to bfloat16 that its own loader would do otherwise

FAMILIES = sorted(path.stem for path in (Path(__file__).parent / "families").glob("[!_]*.py") if path.stem != "case")
CASES = [case for family in FAMILIES for case in import_module(f"tests.backbones.families.{family}").CASES]
FIRST = [next(cases) for _, cases in groupby(CASES, key=lambda case: case.model.__module__)]  # of every family
IN_EVERY_WAY = ("wan", "hunyuan_video", "flux", "ltx2")  # by make test: other text, other blocks, other streams
FLOAT32 = BOUNDS[torch.float32]


def family(case: Case) -> str:
    return case.model.__module__.rsplit(".", 1)[-1]


every_case = pytest.mark.parametrize("case", CASES, ids=str)


class Scene:
    """Three unequal shots of a case, a batch of two, each at a noise level of its own; a global prompt before them."""

    def __init__(self, case: Case, *, seed: int = 0, prompt: bool = False) -> None:
        self.case = case
        self.adapter = retrofit(case.model()).adapter  # the scene's own: inputs are drawn by it, outputs are not
        assert (case.text is not None) == (self.adapter.traits.text == "cross")  # else prompts would go uncompared
        generator = torch.Generator().manual_seed(seed)
        drawn = [self.adapter.example(s, batch=2, generator=generator, dtype=torch.float32) for s in case.shots]
        self.shots = [replace(s, extras={n: x for n, x in s.extras.items() if n not in case.without}) for s in drawn]
        self.t = torch.rand(2, len(self.shots), generator=generator)
        if prompt:
            tokens, width = max(4, self.adapter.traits.text_tokens[0]), self.adapter.traits.text_width
            text = torch.randn(2, tokens, width, generator=generator)
            first, takes = self.shots[0], self.adapter.traits.extras
            extras = {n: x for n, x in first.extras.items() if not (takes[n].image or takes[n].follows_latents)}
            dummy = None if case.text else torch.zeros_like(first.latents[:, :, : self.adapter.traits.patch[0]])
            self.shots = [ShotInput(text=text, latents=dummy, extras=extras, role="global"), *self.shots]
            self.t = torch.cat([torch.zeros(2, 1), self.t], dim=1)

    def alone(self, model, i):
        """The model's own forward on one shot; a global prompt without video gets some, which nobody sees."""
        shot = self.shots[i]
        if shot.latents is None:
            shot = replace(self.shots[1], text=shot.text)
        adapter = type(self.adapter)(model)
        return adapter.single_shot(adapter.prepare(shot), adapter.traits.timestep(self.t[:, i]))

    def oracle(self, *, pattern="bidirectional", text="own"):
        """What the unmodified forwards give where their attentions are joined."""
        model = self.case.model()
        shots = [s if s.latents is None else self.adapter.prepare(s) for s in self.shots]
        steps = [0 if s.latents is None else self.case.steps(s, self.adapter.shot(s)) for s in shots]
        place = torch.arange(len(shots))
        own, prompt = place[:, None] == place, torch.tensor([s.role == "global" for s in shots])
        video = torch.tensor([s.latents is not None for s in shots])
        earlier = torch.ones_like(own) if pattern == "bidirectional" else place <= place[:, None]
        heard = {"own": own, "own_and_global": own | prompt, "all": earlier | prompt}[text]
        sees = {"text": Join(heard, turned=False), "image": Join(own, turned=False)}
        joins = {m: Join(own | (earlier & video)) for m in self.case.joined(model)}
        joins |= {m: [sees[source] for source in self.case.sources] for m in (self.case.text or (lambda _: ()))(model)}
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


@pytest.mark.parametrize(
    ("case", "text"),
    [(case, text) for case in CASES for text in (("own_and_global", "all") if case.text else ("own",))],
    ids=str,
)
@pytest.mark.parametrize("pattern", ["bidirectional", "context_causal"])
@torch.no_grad()
def test_a_global_prompt_and_those_of_other_shots_are_heard(case, text, pattern):
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


@pytest.mark.parametrize(
    ("case", "scheme", "dtype"),
    [
        pytest.param(
            case,
            scheme,
            dtype,
            id=f"{scheme}-{str(dtype).removeprefix('torch.')}-{case}",
            marks=()
            if (scheme, dtype) == ("anchored", torch.float32) or (case in FIRST and family(case) in IN_EVERY_WAY)
            else pytest.mark.prove,
        )
        for scheme in ("anchored", "paper")
        for dtype in (torch.float32, torch.bfloat16)
        for case in CASES
    ],
)
def test_conformance(case, scheme, dtype):
    broken = [f for f in conformance(case.model, schemes=[scheme], dtypes=[dtype]) if not f.holds]
    assert not broken, "\n".join(map(str, broken))


OF_PROMPTS = {  # in all of the families: extras that a negative prompt has of its own
    *("pooled_projections", "encoder_hidden_states_t5"),
    *("encoder_hidden_states_2", "encoder_attention_mask_2"),
}


@every_case
def test_what_belongs_to_a_prompt_is_marked(case):
    traits = registry().adapter(case.model()).traits
    marked = {name for name, extra in traits.extras.items() if extra.prompt}
    assert marked == OF_PROMPTS & set(traits.extras)


def wrong_uses(shot, traits, rates):
    """Shots that no model of these traits can take, each with what its error says: the argument, and what came.

    ``rates`` are those extras that are frame rates.
    """
    nan, batch = float("nan"), len(shot.latents)

    def extra(name, value):
        return replace(shot, extras={**shot.extras, name: value})

    yield r"latents: got \[0, ", replace(shot, latents=shot.latents[:0])
    yield r"latents: got frames, height, width \(0, ", replace(shot, latents=shot.latents[:, :, :0])
    for axis, size in enumerate(traits.patch, start=2):
        if size > 1:
            cut = shot.latents.narrow(axis, 0, shot.latents.shape[axis] - 1)
            yield "latents: got frames, height, width ", replace(shot, latents=cut)
    yield "latents: got a tensor of torch.uint8", replace(shot, latents=shot.latents.byte())
    yield "text: got a tensor of torch.int64", replace(shot, text=shot.text.long())
    yield rf"text: got \[{batch - 1}, ", replace(shot, text=shot.text[1:])
    yield "text: got .*, 0]", replace(shot, text=shot.text[..., :0])
    yield "text is on meta", replace(shot, text=shot.text.to("meta"))
    for name, kind in traits.extras.items():
        if kind.shape is None:
            number = f"extras: {name} is .*, expected a number"
            for value in (-1, nan, 10**400, "24", None, torch.tensor(24.0), *((0, True) if name in rates else ())):
                yield number, extra(name, value)
            if name in rates:
                yield (
                    f"extras: with {{'{name}': 1e-320}}, tokens lie at places that are not finite",
                    extra(name, 1e-320),
                )
        elif name == traits.text_mask:
            mask = torch.ones(shot.text.shape[:2])
            for value in (0.5 * mask, nan * mask, mask.cumsum(1) - 2):
                yield f"extras: {name} has other values than 0 and 1", extra(name, value)
            yield (
                f"extras: {name} is .*, expected .*1 for every text token",
                extra(name, torch.cat([mask, mask], dim=1)),
            )
            yield f"extras: {name} is on meta", extra(name, mask.to("meta"))
        elif name in shot.extras:
            given = shot.extras[name]
            yield f"extras: {name} is on meta", extra(name, given.to("meta"))
            yield f"extras: {name} is torch.complex64, expected a ", extra(name, given.to(torch.complex64))
            yield rf"extras: {name} is \[{batch - 1}", extra(name, given[1:])
            yield f"extras: {name} .*(not finite|than 0 and 1|from nan)", extra(name, given * nan)
            if kind.has_channels:
                yield f"extras: {name} is torch.uint8, expected a floating-point", extra(name, given.byte())


@every_case
@torch.no_grad()
def test_wrong_use_names_the_argument_and_what_came(case):
    scene, model = Scene(case), retrofit(case.model())
    shot, t = scene.shots[0], scene.t[:, :1]
    rates = set() if "skyreels" in str(case) else {"fps", "frame_rate"}  # there it is the kind of a rate, 0 or 1
    for message, wrong in wrong_uses(shot, model.adapter.traits, rates):
        with pytest.raises(ValueError, match=f"^{message}"):
            model([wrong], t)


@every_case
@torch.no_grad()
def test_what_the_models_own_forward_fails_on_is_named(case):
    """Other dtypes than the weights': some models convert, and then a scene is served as well."""
    scene, model = Scene(case), retrofit(case.model())
    adapter, shot, t = model.adapter, scene.shots[0], scene.t[:, :1]
    wide = {n for n, extra in adapter.traits.extras.items() if extra.has_channels} & set(shot.extras)
    wrong = {name: replace(shot, **{name: getattr(shot, name).double()}) for name in ("latents", "text")}
    wrong |= {f"extras: {n}": replace(shot, extras={**shot.extras, n: shot.extras[n].double()}) for n in wide}
    for name, given in wrong.items():
        try:
            adapter.single_shot(adapter.prepare(given), adapter.traits.timestep(t[:, 0]))
        except RuntimeError:
            with pytest.raises(
                ValueError, match=rf"^{name}: got torch\.float64 on cpu in shot 0, expected torch\.float32"
            ):
                model([given], t)
        else:
            assert model([given], t)[0].isfinite().all()


def described(traits):
    """What a row of the support table must say of a model: text, RoPE or none, path, timesteps."""
    clean, noise = traits.timesteps
    vp = isinstance(traits.path, VariancePreserving)
    return traits.text, traits.pairing is not None, vp, getattr(traits.path, "toward_data", False), clean, noise


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_of_the_support_table_is_true(family):
    cases = import_module(f"tests.backbones.families.{family}").CASES
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
