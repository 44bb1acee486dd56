"""Figure 1's count of operations against those that run in its modes; and the picture of it."""

import json

import pytest
import torch

from benchmarks import figure1
from benchmarks.generation_cost import MODES, PAPER_SHOT, cost, label, scene_of
from lct_backbones.mmdit import PAPER_3B, MMDiT, tiny
from lct_core import Shot, ShotInput, generation, retrofit
from lct_core.cost import Cost
from tests.operations import Operations

pytestmark = pytest.mark.internals

STEPS = 2
GLOBAL = Shot(3, (1, 2, 3), "global")
SCENES = {
    "one shot": [Shot(4, (2, 2, 2))],
    "one shot and a global one": [GLOBAL, Shot(4, (2, 2, 3))],
    "ragged": [Shot(2, (2, 2, 3)), Shot(0, (1, 1, 1)), Shot(3, (1, 4, 2)), Shot(1, (3, 1, 2))],
    "ragged with a global one": [GLOBAL, Shot(5, (1, 2, 3)), Shot(1, (2, 3, 1)), Shot(0, (4, 1, 1))],
    "more than the trained window": [Shot(1, (1, 1, 2))] * 10,
}


def shot_after_shot(mode, **options):
    return lambda model, scene: mode(model, scene, steps=STEPS, history=generation.recent(len(scene)), **options)


GENERATE = {
    "recomputed": shot_after_shot(generation.autoregressive, pattern="context_causal"),
    "joint": lambda model, scene: generation.joint(model, scene, steps=STEPS),
    "cached": shot_after_shot(generation.causal),
    "independent": lambda model, scene: [
        generation.joint(model, [shot], steps=STEPS) for shot in scene if shot.role == "shot"
    ],
}


def counted(run):
    """Of the products that run, linear layers are addmm, and all else is attention."""
    with torch.no_grad(), Operations() as counter:
        run()
    linear = counter.counts[torch.ops.aten.addmm]
    return linear, counter.total - linear


def operations(found: Cost):
    return found.linear, found.attention


@pytest.mark.parametrize("shots", SCENES.values(), ids=SCENES)
@pytest.mark.parametrize("mode", MODES)
def test_every_operation_of_every_mode(mode, shots):
    model, generator = tiny(), torch.Generator().manual_seed(0)
    engine = retrofit(model, kernel="sdpa")
    scene = [engine.adapter.example(shot, batch=1, generator=generator, dtype=torch.float32) for shot in shots]
    if shots[0].role == "global":
        scene[0] = ShotInput(text=scene[0].text, latents=torch.zeros_like(scene[0].latents), role="global")
    assert operations(cost(model, MODES[mode](shots, STEPS))) == counted(lambda: GENERATE[mode](engine, scene))


def test_one_pass_of_the_papers_model():
    """On the meta device, where attention is two matrix products."""
    with torch.device("meta"):
        model, (frames, height, width) = MMDiT(**PAPER_3B), PAPER_SHOT.grid
        latents = torch.empty(1, model.channels, frames, 2 * height, 2 * width)
        text = torch.empty(1, PAPER_SHOT.text, model.text_width)
        got = counted(lambda: model(latents, torch.empty(1), text))
    assert operations(cost(model, MODES["independent"]([PAPER_SHOT], 1))) == got


@pytest.mark.parametrize("count", [1, 2, 7, 20])
def test_growth_with_the_number_of_shots(count):
    """The formulas, for a scene without a global shot; the cache spares the last shot its write."""
    with torch.device("meta"):
        model = MMDiT(**PAPER_3B)
    shot, steps, n = Shot(5, (2, 3, 4)), 4, count
    alone = cost(model, MODES["joint"]([shot], 1))
    growth = {
        "joint": (steps * n, steps * n**2),
        "cached": ((steps + 1) * n - 1, (steps + 1) * n * (n + 1) // 2 - n),
        "recomputed": (steps * n * (n + 1) // 2, steps * n * (n + 1) * (n + 2) // 6),
        "independent": (steps * n, steps * n),
    }
    for mode, (linear, attention) in growth.items():
        got = cost(model, MODES[mode]([shot] * n, steps))
        assert operations(got) == (linear * alone.linear, attention * alone.attention)
        assert got.total == got.linear + got.attention
        assert got.shots == linear


def test_a_scene_has_a_global_shot_of_one_frame():
    shot = Shot(5, (2, 3, 4))
    assert scene_of(shot, 2) == [Shot(5, (1, 3, 4), "global"), shot, shot]


def test_the_figure_has_a_panel_per_device(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="no latencies, expected generation-"):
        figure1.main(tmp_path)
    panels = []
    monkeypatch.setattr(figure1, "_dress", lambda ax, *words: panels.append(ax))
    for device, gpu in (("cpu", {}), ("cuda", {"gpu": "a GPU"})):
        shape = {"shots": [1, 2], "parameters": 10**7, "tokens": 160, "steps": 3, "dtype": "float32"}
        time = {"seconds": 1, "low": 0.5, "high": 2, "gflops_per_second": 1}
        times = {label(mode, n): time for mode in MODES for n in (1, 2) if (mode, n) != ("recomputed", 2)}
        parts = {"name": device, "date": "", "device": device, "rounds": 1, "versions": {}, "source": {}}
        machine = {"cpu": "a CPU", "threads": 2, "instructions": ""} | gpu
        record = {**parts, "shape": shape, "machine": machine, "times": times, "comparisons": []}
        (tmp_path / f"generation-{device}.json").write_text(json.dumps(record))
        panels.clear()
        figure1.main(tmp_path)
        shots = [[len(bars.lines[0].get_xdata()) for bars in ax.containers] for ax in panels]
        assert shots == [[20] * 4] + [[1, 2, 2, 2]] * (1 + bool(gpu))
        assert (tmp_path / "figure1.png").read_bytes().startswith(b"\x89PNG")
