"""The conformance suite: what must hold for every adapter, measured on one.

``lct conformance MODULE:FACTORY`` runs it; so does a test::

    @pytest.mark.parametrize("scheme", ["anchored", "paper"])
    def test_conformance(scheme):
        for finding in conformance(make_my_model, schemes=[scheme]):
            assert finding.holds, finding
"""

import copy
import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lct_core.backbone import Backbone, ShotInput
from lct_core.cache import KVCache
from lct_core.coordinates import Scheme
from lct_core.engine.visibility import TextScope
from lct_core.layout import Shot
from lct_core.losses import tuning_loss
from lct_core.plugins import registry
from lct_core.scene_model import SceneModel, retrofit
from lct_core.testing.definition import definition
from lct_core.testing.findings import Finding, short
from lct_core.testing.kernels import kernel_conformance as kernel_conformance  # known by this place too
from lct_core.testing.tolerances import BOUNDS, error

Factory = Callable[[], nn.Module | Backbone]


def conformance(
    factory: Factory,
    *,
    schemes: Sequence[Scheme] = ("anchored", "paper"),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
) -> Iterator[Finding]:
    """Measure every invariant of a scene model, in both patterns, on three small unequal shots.

    Args:
        factory: Makes a small model that an installed backbone handles, or an adapter around one, with weights that
            are not trivial: where a scene's shots do not change one another, invariant 2 says so. It must make the same
            model every time.
        schemes: Coordinate schemes to run in.
        dtypes: float32, bfloat16 or both.

    Yields:
        Findings as they are made.
    """
    for dtype in dtypes:
        for scheme in schemes:
            yield from _Case(factory, scheme, dtype).findings()


class _Case:
    """One adapter in one scheme and dtype, and the inputs that all invariants are measured on."""

    def __init__(self, factory: Factory, scheme: Scheme, dtype: torch.dtype) -> None:
        made = factory()
        self.adapter = made if isinstance(made, Backbone) else registry().adapter(made)
        self.adapter.cast(dtype)
        self.adapter.model.eval()
        self.scheme, self.dtype = scheme, dtype
        traits = self.adapter.traits
        self.text: TextScope = "own" if traits.text == "joint" else "own_and_global"
        self.one_shot = "one shot" if traits.text_mask is None else "masked"
        self.keys = list(self.adapter.model.state_dict())
        self.parameters = sum(p.numel() for p in self.adapter.model.parameters())

    def findings(self) -> Iterator[Finding]:
        """All of them, in order. What an adapter raises fails the invariant that it was raised in."""
        measures = (
            self._one_shot,
            self._definition,
            self._causal,
            self._cached,
            self._packed,
            self._checkpointed,
            self._shifted,
            self._copies,
            self._refusals,
        )
        for invariant, measure in enumerate(measures, start=1):
            found: list[Finding] = []
            try:
                with torch.set_grad_enabled(measure == self._checkpointed):
                    found.extend(measure())
            except Exception as error:  # whatever the adapter or its model raises
                place = traceback.extract_tb(error.__traceback__)[-1]
                raised = f"raised {type(error).__name__}: {error} ({place.filename}:{place.lineno})"
                found.append(Finding(invariant, raised, self._name(), float("inf"), 0.0))
            yield from found
            if invariant == 1 and not hasattr(self, "model"):
                return  # not even one shot of the model itself

    def _inputs(self, seed: int = 0) -> tuple[list[ShotInput], Tensor]:
        """Three shots of different sizes, texts and noise levels, one of them a single token; a batch of two."""
        adapter, generator = self.adapter, torch.Generator().manual_seed(seed)
        least = 0 if adapter.traits.text == "joint" else 1
        shots = [Shot(3, (2, 3, 4)), Shot(least, (1, 1, 1)), Shot(5, (1, 4, 2))]
        inputs = [adapter.example(s, batch=2, generator=generator, dtype=self.dtype) for s in shots]
        return inputs, torch.rand(2, 3, generator=generator)

    def _single_shots(self) -> list[Tensor]:
        shots, t = self._inputs()
        return [self.adapter.single_shot(x, self.adapter.traits.timestep(t[:, i])) for i, x in enumerate(shots)]

    def _alone(self) -> list[Tensor]:
        """Every shot as a scene of its own."""
        shots, t = self._inputs()
        return [self.model([shot], t[:, i : i + 1])[0] for i, shot in enumerate(shots)]

    def _base_error(self) -> float:
        """What the model's own forward errs in a dtype below float32."""
        if self.dtype == torch.float32:
            return 0.0
        adapter = copy.deepcopy(self.adapter)
        adapter.cast(torch.float32)
        shots, t = self._inputs()
        exact = [
            adapter.single_shot(_cast(x, torch.float32), adapter.traits.timestep(t[:, i])) for i, x in enumerate(shots)
        ]
        return max(error(out, x) for out, x in zip(self._single_shots(), exact, strict=True))

    def _one_shot(self) -> Iterator[Finding]:
        before = self._single_shots()
        self.model = retrofit(self.adapter.model, scheme=self.scheme, backbone=self.adapter, text=self.text)
        after = self._single_shots()
        yield self._finding(1, "the model's own forward is untouched", "copies", after, before)
        changed = self.keys != list(self.adapter.model.state_dict())
        added = sum(p.numel() for p in self.adapter.model.parameters()) - self.parameters
        yield Finding(1, "same state_dict keys and parameter count", self._name(), float(changed) + abs(added), 0.0)
        alone = self._alone()
        alike = all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(alone, before, strict=True))
        yield Finding(1, "shape and dtype of the base model's output", self._name(), float(not alike), 0.0)
        if self.scheme == "anchored":
            own = self._base_error()
            yield self._finding(1, "one shot equals the base model", self.one_shot, alone, before, own=own)

    def _definition(self) -> Iterator[Finding]:
        shots, t = self._inputs()
        others, _ = self._inputs(seed=1)
        for pattern in ("bidirectional", "context_causal"):
            got, truth, own = self.model([shots], t, pattern=pattern)[0], self._truth(pattern), self._own_error(pattern)
            yield self._finding(2, "equals the dense-mask definition", "definition", got, truth, pattern, own=own)
            changed = self.model([others[0], *shots[1:]], t, pattern=pattern)
            deaf, name = error(changed[2], got[2]) <= 1e-3, "shots see one another (else the rest proves nothing)"
            yield Finding(2, name, self._name(pattern), float(deaf), 0.0)
        if self.adapter.traits.text == "cross":
            yield from self._heard()

    def _heard(self) -> Iterator[Finding]:
        """Where text is cross-attended: who hears which prompt, the global one without video among them."""
        shots, t = self._inputs()
        scene = [self._prompt(shots[0]), *shots]
        levels = torch.cat([torch.zeros_like(t[:, :1]), t], dim=1)
        dummy = shots[0].latents.new_zeros(len(t), self.adapter.traits.latent_channels, *self.adapter.traits.patch)
        for text in ("own_and_global", "all"):
            for pattern in ("bidirectional", "context_causal"):
                model = retrofit(self.adapter.model, scheme=self.scheme, backbone=self.adapter, text=text)
                got = model(scene, levels, pattern=pattern)[1:]
                given = [replace(scene[0], latents=dummy), *shots]
                said = {
                    dtype: self._by_definition(pattern, dtype, exact=exact, given=(given, levels), text=text)[1:]
                    for dtype, exact in ((torch.float32, True), (self.dtype, self.dtype == torch.float32))
                }
                own = max(map(error, said[self.dtype], said[torch.float32]))
                name = f"prompts heard as by definition, text={text!r}"
                yield self._finding(2, name, "definition", got, said[torch.float32], pattern, own=own)

    def _causal(self) -> Iterator[Finding]:
        shots, t = self._inputs()
        others, levels = self._inputs(seed=1)
        full = self.model(shots, t, pattern="context_causal")
        changed = self.model([*shots[:2], others[2]], torch.cat([t[:, :2], levels[:, 2:]], 1), pattern="context_causal")
        absent = self.model(shots[:2], t[:, :2], pattern="context_causal")
        name = "a shot does not depend on later shots"
        yield self._finding(3, name, "causal", [*changed[:2], *absent], [*full[:2], *full[:2]], "context_causal")

    def _cached(self) -> Iterator[Finding]:
        shots, t = self._inputs()
        own = self._own_error("context_causal")
        full = self.model(shots, t, pattern="context_causal")
        outputs, _ = self._one_by_one(shots, t)
        yield self._finding(4, "cached equals uncached", "cached", outputs, full, "context_causal", own=own)
        _, cache = self._one_by_one(shots[:1], t)
        together = self.model(shots[1:], t[:, 1:], pattern="context_causal", cache=cache)
        name = "several shots behind a history"
        yield self._finding(4, name, "cached", together, full[1:], "context_causal", own=own)

        scene, levels = [self._prompt(shots[0]), *shots[1:]], torch.cat([torch.zeros_like(t[:, :1]), t[:, 1:]], dim=1)
        full = self.model(scene, levels, pattern="context_causal")
        outputs, _ = self._one_by_one(scene, levels)
        name = "cached behind a global shot equals uncached"
        yield self._finding(4, name, "cached", outputs[1:], full[1:], "context_causal", own=own)

    def _one_by_one(self, shots: Sequence[ShotInput], t: Tensor) -> tuple[list[Tensor], KVCache]:
        """The outputs of shots that are run one behind the other, and the history that they leave."""
        cache, outputs = KVCache(), list[Tensor]()
        for i, shot in enumerate(shots):
            outputs += self.model([shot], t[:, i : i + 1], pattern="context_causal", cache=cache)
            cache.append(i)
        return outputs, cache

    def _packed(self) -> Iterator[Finding]:
        shots, t = self._inputs()
        for pattern in ("bidirectional", "context_causal"):
            row = self.model([shots[:2], shots[2:]], t, pattern=pattern)
            alone = [self.model(shots[:2], t[:, :2], pattern=pattern), self.model(shots[2:], t[:, 2:], pattern=pattern)]
            yield self._finding(5, "packing changes no scene", "packed", _flat(row), _flat(alone), pattern)
            twins, levels = self._inputs(seed=1)
            together = [[shots[0], twins[1], twins[0]], [shots[2], twins[2], shots[1]]]
            order = torch.cat([t, levels], dim=1)[:, [0, 4, 3, 2, 5, 1]]
            one_by_one = self.model(together, order, pattern=pattern)
            self.model.batch_shots = True
            try:
                batched = self.model(together, order, pattern=pattern)
            finally:
                self.model.batch_shots = False
            name = "shots of equal shape run as a batch equal shots run one by one"
            own = self._own_error(pattern)
            yield self._finding(5, name, "batched", _flat(batched), _flat(one_by_one), pattern, own=own)

    def _checkpointed(self) -> Iterator[Finding]:
        shots, t = self._inputs()
        noise = [torch.ones_like(shot.latents) for shot in shots]
        for pattern in ("bidirectional", "context_causal"):
            gradients = []
            for self.model.gradient_checkpointing in (False, True):
                self.adapter.model.zero_grad()
                tuning_loss(self.model, shots, t, noise, pattern=pattern).mean.backward()
                gradients.append([p.grad.flatten() for p in self.adapter.model.parameters() if p.grad is not None])
            self.model.gradient_checkpointing = False
            self.adapter.model.zero_grad()
            plain, checkpointed = (torch.cat(g) for g in gradients)
            own = self._own_error(pattern) if self.dtype != torch.float32 else 0.0
            name = "gradients with checkpointing equal those without"
            yield self._finding(6, name, "checkpointed", [checkpointed], [plain], pattern, own=own)

    def _shifted(self) -> Iterator[Finding]:
        if self.adapter.traits.pairing is None:
            return
        shots, t = self._inputs()
        shifted = copy.copy(self.adapter)
        step = torch.tensor(self.adapter.traits.unit, dtype=torch.float64)
        rope = self.adapter.rope
        shifted.rope = lambda coords: rope(coords + 64 * step.to(coords.device))  # type: ignore[method-assign]
        moved = retrofit(shifted.model, scheme=self.scheme, backbone=shifted, text=self.text)
        for pattern in ("bidirectional", "context_causal"):
            got, expected = (m(shots, t, pattern=pattern) for m in (moved, self.model))
            own = self._own_error(pattern)
            yield self._finding(7, "moving a whole scene changes nothing", "shifted", got, expected, pattern, own=own)
        _, cache = self._one_by_one(shots[:2], t)
        expected = self.model(shots[2:], t[:, 2:], cache=cache)
        cache.reposition([entry.origin + 64 for entry in cache.shots])
        got = self.model(shots[2:], t[:, 2:], cache=cache)
        name = "moving a cached history and what follows changes nothing"
        yield self._finding(7, name, "shifted", got, expected, own=self._own_error("context_causal"))

    def _copies(self) -> Iterator[Finding]:
        """Copies are made, then the original's weights are changed: a copy that runs the original's would show it."""
        shots, t = self._inputs()
        weights = copy.deepcopy(self.adapter.model.state_dict())
        copies = [copy.deepcopy(self.model), pickle.loads(pickle.dumps(self.model))]
        expected = self.model(shots, t)
        for parameter in self.adapter.model.parameters():
            parameter.mul_(1.25)
        changed = self.model(shots, t)
        if self.scheme == "anchored":
            alone, base, own = self._alone(), self._single_shots(), self._base_error()
            bound = f"{self.one_shot}, changed"
            yield self._finding(8, "weights that change are the weights that run", bound, alone, base, own=own)
        for name, twin in zip(("a deep copy", "a pickle round trip"), copies, strict=True):
            yield self._finding(8, f"{name} runs its own weights", "copies", twin(shots, t), expected)
            twin.backbone.load_state_dict(self.adapter.model.state_dict())
            yield self._finding(8, f"{name} runs the weights loaded into it", "copies", twin(shots, t), changed)
        self.adapter.model.load_state_dict(weights)

    def _refusals(self) -> Iterator[Finding]:
        shots, t = self._inputs()
        latents, text = shots[0].latents, shots[0].text
        wrong: dict[str, Callable[[], object]] = {
            "an unknown kernel": lambda: SceneModel(self.adapter, scheme=self.scheme, kernel="no such kernel")(
                shots, t
            ),
            "an unknown scheme": lambda: retrofit(self.adapter.model, scheme="none", backbone=self.adapter),  # type: ignore[arg-type]
            "an unknown pattern": lambda: self.model(shots, t, pattern="none"),
            "a noise level above 1": lambda: self.model(shots, t + 1),
            "a noise level too few": lambda: self.model(shots, t[:, 1:]),
            "latents with a channel too many": lambda: self.model(
                [replace(shots[0], latents=torch.cat([latents, latents[:, :1]], 1))], t[:, :1]
            ),
            "text of another width": lambda: self.model([replace(shots[0], text=torch.cat([text, text], 2))], t[:, :1]),
            "an unknown extra": lambda: self.model(
                [replace(shots[0], extras={**shots[0].extras, "no such argument": 1})], t[:, :1]
            ),
            "an empty scene": lambda: self.model([], t),
        }
        for what, call in wrong.items():
            try:
                call()
                silent = 1.0
            except ValueError:
                silent = 0.0
            except Exception:  # raised, but not so that a user understands it
                silent = 1.0
            yield Finding(9, f"refuses {what}", self._name(), silent, 0.0)

    def _truth(self, pattern: str) -> list[Tensor]:
        """The definition in float32, attention in float64: on weights and inputs as they are rounded."""
        return self._by_definition(pattern, torch.float32, exact=True)

    def _own_error(self, pattern: str) -> float:
        """What plain eager arithmetic in this dtype errs."""
        plain = self._by_definition(pattern, self.dtype, exact=False)
        return max(error(p, x) for p, x in zip(plain, self._truth(pattern), strict=True))

    def _by_definition(
        self,
        pattern: str,
        dtype: torch.dtype,
        *,
        exact: bool,
        given: tuple[list[ShotInput], Tensor] | None = None,
        text: TextScope | None = None,
    ) -> list[Tensor]:
        shots, t = given or self._inputs()
        adapter = copy.deepcopy(self.adapter)
        adapter.cast(dtype)
        shots = [_cast(shot, dtype) for shot in shots]
        return definition(adapter, [shots], t, scheme=self.scheme, pattern=pattern, text=text or self.text, exact=exact)

    def _prompt(self, shot: ShotInput) -> ShotInput:
        """The shot's text as a global prompt, with the dummy video that it has where text is part of self-attention."""
        takes = self.adapter.traits.extras
        extras = {n: x for n, x in shot.extras.items() if not (takes[n].image or takes[n].follows_latents)}
        if self.adapter.traits.text == "cross":
            return ShotInput(text=shot.text, extras=extras, role="global")
        dummy = torch.zeros_like(shot.latents[:, :, : self.adapter.traits.patch[0]])
        return ShotInput(latents=dummy, text=shot.text, extras=extras, role="global")

    def _finding(
        self,
        invariant: int,
        name: str,
        bound: str,
        got: Sequence[Tensor],
        expected: Sequence[Tensor],
        pattern: str = "",
        *,
        own: float = 0.0,
    ) -> Finding:
        worst = max(error(g, x) for g, x in zip(got, expected, strict=True))
        return Finding(invariant, name, self._name(pattern), worst, BOUNDS[self.dtype][bound].given(own))

    def _name(self, pattern: str = "") -> str:
        return ", ".join(filter(None, (self.scheme, pattern, short(self.dtype))))


def _cast(shot: ShotInput, dtype: torch.dtype) -> ShotInput:
    """The shot with all its floating-point tensors in a dtype."""

    def cast(x: object) -> object:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    return replace(
        shot,
        latents=shot.latents.to(dtype),
        text=shot.text.to(dtype),
        extras={name: cast(x) for name, x in shot.extras.items()},
    )


def _flat(scenes: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [out for scene in scenes for out in scene]
