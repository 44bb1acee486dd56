"""The demo's contact sheets, films and plots."""

from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import reduce
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor

from lct_core.data import read_video
from lct_core.demo.film import film
from lct_core.demo.plots import accumulation, loss_curves, modes
from lct_core.demo.world import render, sample_scene
from lct_core.pictures.sheet import SceneRows, contact_sheet


def rows_of(seed: int, num_shots: int, *, size: int = 24) -> SceneRows:
    generator = torch.Generator().manual_seed(seed)
    scene = sample_scene(num_shots, generator=generator)
    noise = torch.randn(num_shots, 3, 4, size, size, generator=generator)
    return SceneRows(scene.texts, {"training data": list(render(scene, size=size)), "noise": list(noise)})


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_contact_sheet(tmp_path: Path) -> None:
    scenes = [rows_of(0, 3), rows_of(1, 2)]
    contact_sheet(tmp_path / "sheet.png", scenes, title="Two scenes")
    contact_sheet(tmp_path / "plain.png", scenes[:1])
    assert is_png(tmp_path / "sheet.png")
    assert is_png(tmp_path / "plain.png")
    with pytest.raises(ValueError, match="scenes: got none, expected at least one"):
        contact_sheet(tmp_path / "none.png", [])


def test_rows_have_one_shot_per_text() -> None:
    shots = rows_of(0, 3).rows["noise"]
    with pytest.raises(ValueError, match="row 'short' has 1 shots, expected one for each of its 3 texts"):
        SceneRows(["a", "b", "c"], {"short": shots[:1]})
    for texts, rows in (([], {"none": []}), (["a"], {})):
        with pytest.raises(ValueError, match="expected at least one of each"):
            SceneRows(texts, rows)


def runs(flags: Tensor) -> list[slice]:
    """Where flags are set without a gap."""
    edges = torch.nn.functional.pad(flags.int(), (1, 1)).diff()
    pairs = zip((edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist(), strict=True)
    return [slice(*pair) for pair in pairs]


@pytest.mark.parametrize(("side", "size", "factor"), [(24, 192, 8), (24, 60, 2), (34, 20, 1), (17, 17, 1)])
def test_films_show_every_methods_pixels_in_its_panel(tmp_path: Path, side: int, size: int, factor: int) -> None:
    def shots(count: int, seed: int) -> list[Tensor]:  # grey: a file softens colours' edges, not brightness
        dark = torch.rand(count, 1, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 0.6
        return list(dark.expand(-1, 3, -1, -1, -1))

    scenes = [SceneRows(["?"] * n, {"one": shots(n, n), "and the other": shots(n, 10 + n)}) for n in (2, 1)]
    film(tmp_path / "film.mp4", scenes, size=size)
    read = read_video(tmp_path / "film.mp4")
    assert read.shape[1] == (2 + 1) * 3

    panel = factor * side
    is_dark = read.amax((0, 1)) < 0.8
    bottom = runs(is_dark.float().mean(1) > 0.3)[-1]  # below the labels
    panels = runs(is_dark[bottom].float().mean(0) > 0.5)
    assert bottom.stop - bottom.start == panel
    assert [found.stop - found.start for found in panels] == [panel, panel]
    for label, columns in zip(("one", "other"), panels, strict=True):
        told = torch.cat([shot for scene in scenes for row, of in scene.rows.items() if label in row for shot in of], 1)
        shown = read[:, :, bottom, columns]
        small = reduce(shown, "c t (y p) (x q) -> c t y x", "mean", p=factor, q=factor)
        torch.testing.assert_close(small, told, atol=0.02, rtol=0)
        torch.testing.assert_close(shown[..., ::factor, ::factor], told, atol=0.03, rtol=0)  # the nearest, no blend
        letters = read[0, :, : bottom.start, columns] < 0.5
        assert letters.any()
        assert torch.equal(letters.any(0), letters.all(0))  # they stay


def test_films_refuse_what_cannot_stand_side_by_side(tmp_path: Path) -> None:
    path, scene = tmp_path / "film.mp4", rows_of(0, 3)
    with pytest.raises(ValueError, match="scenes: got none, expected at least one"):
        film(path, [])
    with pytest.raises(ValueError, match="scene 2 has 1 rows, expected 2 as in scene 1"):
        film(path, [scene, SceneRows(scene.texts, {"data": scene.rows["noise"]})])
    longer = SceneRows(scene.texts[:1], {"a": [torch.zeros(3, 4, 24, 24)], "b": [torch.zeros(3, 5, 24, 24)]})
    with pytest.raises(ValueError, match=r"shot 1 of row 'b' of scene 1 has shape \[3, 5, 24, 24\], expected \[3, 4,"):
        film(path, [longer])
    with pytest.raises(ValueError, match=r"'training data' of scene 2 has shape \[3, 4, 16, 16\], expected \[3, 4, 24"):
        film(path, [scene, rows_of(0, 3, size=16)])
    assert not path.exists()


def data_of(line: Line2D) -> list[list[float]]:
    return [np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()]


def widths(axes: Axes) -> list[float]:
    return [bar.get_width() for bar in axes.patches if isinstance(bar, Rectangle)]


def test_loss_curves_have_a_panel_per_stage(tmp_path: Path) -> None:
    scenes = [(step, "scene", 1.0 + step % 2) for step in range(1, 200, 2)]
    singles = [(step, "single_shot", 0.1) for step in range(2, 201, 2)]
    curves = {"first": singles, "second": sorted(scenes + singles)}
    figure = loss_curves(tmp_path / "loss.png", curves)
    assert is_png(tmp_path / "loss.png")
    first, second = figure.axes
    assert [axes.get_title("left") for axes in figure.axes] == ["first", "second"]
    dots, mean = (data_of(line) for line in first.get_lines())
    assert dots == [list(range(2, 201, 2)), [0.1] * 100]
    assert mean[0] == list(range(6, 197, 2))  # of 5 losses each, at the middle one
    assert mean[1] == pytest.approx([0.1] * 96)
    assert len({line.get_color() for line in second.get_lines()}) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["single shots", "scenes"]


def test_running_means_are_means(tmp_path: Path) -> None:
    losses = [(step, "scene", 1 + sqrt(step)) for step in range(1, 101)]
    _, mean = loss_curves(tmp_path / "loss.png", {"stage": losses}).axes[0].get_lines()
    steps, values = data_of(mean)
    expected = [sum(1 + sqrt(near) for near in range(step - 2, step + 3)) / 5 for step in range(3, 99)]
    assert steps == list(range(3, 99))
    assert values == pytest.approx(expected)


def test_modes_are_bars_with_goals(tmp_path: Path) -> None:
    errors, adherence = {"independent": 0.7, "joint": 0.1}, {"joint": 0.9, "independent": 0.8}
    figure = modes(tmp_path / "modes.png", errors, adherence, goals={"joint": 0.23})
    assert is_png(tmp_path / "modes.png")
    left, right = figure.axes
    assert widths(left) == [0.7, 0.1]
    assert widths(right) == [0.8, 0.9]
    assert [label.get_text() for label in left.get_yticklabels()] == ["independent", "joint"]
    assert [text.get_text() for text in left.texts] == ["0.700", "0.100"]
    (goal,) = left.collections
    assert np.asarray(goal.get_offsets()).tolist() == [[0.23, 1]]
    assert left.get_xlabel() == "| goal"
    assert modes(tmp_path / "modes.png", errors, adherence, goals={}).axes[0].get_xlabel() == ""


def test_accumulation_has_a_line_per_noise_level(tmp_path: Path) -> None:
    drift = {500.0: [0.0, 0.3, 0.3], 0.0: [0.0, 0.1, 0.4]}
    figure = accumulation(tmp_path / "drift.png", drift, {t_c: [0.9, 0.8, 0.7] for t_c in drift})
    assert is_png(tmp_path / "drift.png")
    left, right = figure.axes
    assert [line.get_label() for line in left.get_lines()] == ["0", "500"]
    for line, t_c in zip(left.get_lines(), (0.0, 500.0), strict=True):
        assert data_of(line) == [[1, 2, 3], drift[t_c]]
    colours = [[to_rgb(line.get_color()) for line in axes.get_lines()] for axes in (left, right)]
    assert colours[0] == colours[1]
    assert len(set(colours[0])) == 2
    assert len(figure.legends[0].get_texts()) == 2


def test_plots_refuse_what_cannot_be_shown(tmp_path: Path) -> None:
    path = tmp_path / "none.png"
    with pytest.raises(ValueError, match="curves: got no stage, expected losses to show"):
        loss_curves(path, {})
    with pytest.raises(ValueError, match=r"curves: got no loss of \['causal'\]"):
        loss_curves(path, {"causal": []})
    with pytest.raises(ValueError, match=r"curves: got the kinds \['both'\], expected 'single_shot' or 'scene'"):
        loss_curves(path, {"causal": [(1, "both", 0.1)]})
    for errors, adherence, goals in (({}, {}, {}), ({"a": 1}, {"b": 1}, {}), ({"a": 1}, {"a": 1}, {"b": 1})):
        with pytest.raises(ValueError, match="errors, adherence, goals: got the modes"):
            modes(path, errors, adherence, goals=goals)
    measures: list[tuple[dict[float, list[float]], dict[float, list[float]]]]
    measures = [({}, {}), ({0: []}, {0: []}), ({0: [0, 1]}, {0: [1]}), ({0: [0]}, {1: [1]})]
    for measure, other in measures:
        with pytest.raises(ValueError, match="drift, adherence: got shots for each t_c"):
            accumulation(path, measure, other)
    assert not path.exists()
