"""``lct demo``: what its options set, and the one line of bad input."""

import pytest

import lct_core.demo.run
from lct_core.cli import main
from lct_core.demo import settings
from lct_core.demo.settings import DemoSettings

pytest.importorskip("av")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], DemoSettings(seed=0)),
        (["--seed", "3"], DemoSettings(seed=3)),
        (["--quick", "--seed", "3"], settings.quick(seed=3)),
        (["--full"], settings.full(seed=0)),
    ],
)
def test_settings(monkeypatch, tmp_path, options, expected):
    asked = []
    monkeypatch.setattr(lct_core.demo.run, "run", lambda out, chosen, *, console: asked.append((out, chosen)))
    assert main(["demo", "--out", str(tmp_path), *options]) == 0
    assert asked == [(tmp_path, expected)]


def test_quick_is_less_and_full_is_more():
    usual, quick, full = DemoSettings(), settings.quick(seed=0), settings.full(seed=0)
    for name in ("scenes", "single_shot_steps", "tuning_steps", "causal_steps"):
        assert 0 < getattr(quick, name) < getattr(usual, name) < getattr(full, name)
    assert quick.long_shots == usual.long_shots == quick.composed == usual.composed == 0
    assert full.long_shots
    assert full.composed
    single, tuning, causal = usual.stages()
    assert [(stage.name, stage.pattern, stage.scene_share) for stage in usual.stages()] == [
        ("single_shot", "own_shot", 0.0),
        ("bidirectional", "bidirectional", 0.5),
        ("causal", "context_causal", 0.5),
    ]
    assert (single.learning_rate, tuning.learning_rate, causal.learning_rate) == (
        usual.single_shot_rate,
        usual.tuning_rate,
        usual.causal_rate,
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--quick", "--full"], "--quick, --full: got both, expected one or none"),
        (["--seed", "-1"], "Invalid value for '--seed': -1 is not in the range 0<=x"),
        (["--seed", "x"], "Invalid value for '--seed': 'x' is not a valid integer range."),
        (["--out", "file"], "Invalid value for '--out': Directory 'file' is a file."),
        (["more"], "Got unexpected extra argument (more)"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(["demo", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lct demo: error: {words}")
    assert not (tmp_path / "runs").exists()
