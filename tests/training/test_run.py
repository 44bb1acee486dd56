"""A run of several stages: one that stopped goes on as if it had not."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch

from lct_core.training import (
    CHECKPOINT,
    METRICS,
    Training,
    load_checkpoint,
    loop,
    train,
    tune,
)
from lct_core.training.run import check_folder
from tests.training.scenes import STAGE, StoppedError, make, same, spoil_gradients, weights, world


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Stages.


NAN, INF = float("nan"), float("inf")


# A whole run.


STAGES = (
    replace(STAGE, steps=5, scene_batch=2),
    replace(STAGE, name="second", steps=4, pattern="context_causal", ema=0.9),
)
ABOUT = {"size": [2, 8, 8], "source": {"mean": torch.arange(3.0)}, "scheme": "anchored"}


def run(out, *, model=None, stages=STAGES, seed=0, about=ABOUT, save_every=2, **options):
    model = make() if model is None else model
    tune(out, model, stages, *world(), seed=seed, about=about, save_every=save_every, **options)
    return model


def metrics(out):
    """The lines of the log, without the time that they took."""
    lines = (out / METRICS).read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert all(entry.pop("seconds") >= 0 for entry in entries)
    return entries


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never stopped, and what a machine that fails after each of its steps leaves behind."""
    root = tmp_path_factory.mktemp("whole")
    steps, stages, reports = [], [], []

    def on_step(report):
        reports.append(report)
        steps.append(shutil.copytree(root / "run", root / f"after_{len(reports)}"))

    model = make()
    run(root / "run", model=model, on_step=on_step, on_stage=lambda stage: stages.append((stage, weights(model))))
    return root / "run", steps, stages, reports


def equal_runs(a, b):
    files = [CHECKPOINT, *(f"{stage.name}.pt" for stage in STAGES)]
    assert sorted(path.name for path in a.iterdir()) == sorted([METRICS, *files])
    assert metrics(a) == metrics(b)
    for name in files:
        assert same(load_checkpoint(a / name), load_checkpoint(b / name))
    return True


def test_each_stage_starts_from_the_last_ones_average(whole):
    out, _, stages, reports = whole
    model, expected = make(), []
    for stage, (called, at_its_end) in zip(STAGES, stages, strict=True):
        training = Training(model, stage)
        train(training, *world(), seed=0, on_step=expected.append)
        assert called == stage
        assert same(at_its_end, weights(model))
        assert same([*at_its_end.values()], training.ema.state_dict()["average"])
        saved = load_checkpoint(out / f"{stage.name}.pt")
        assert (saved["stage"], saved["pattern"]) == (stage.name, stage.pattern)
        assert same(saved["model"], weights(model))
        assert same(saved["about"], ABOUT)
        assert saved["stages"] == [asdict(stage) for stage in STAGES]
        other = make(seed=1)
        other.backbone.load_state_dict(saved["model"])
        assert same(weights(other), weights(model))
    assert reports == expected
    assert metrics(out) == [report._asdict() for report in reports]
    assert same(load_checkpoint(out / CHECKPOINT)["training"], training.state_dict())


@pytest.mark.parametrize("after", range(1, 10))
def test_a_run_goes_on_after_any_step(whole, after, tmp_path):
    """From what is on disk at that step, between checkpoints and at them, in a model of other weights."""
    expected, snapshots, _, reports = whole
    out = shutil.copytree(snapshots[after - 1], tmp_path / "run")
    assert metrics(out) == [report._asdict() for report in reports[:after]]  # every step is on disk at once
    done, left, ends = load_checkpoint(out / CHECKPOINT)["training"]["step"], [], []
    run(out, model=make(seed=1), resume=True, on_step=left.append, on_stage=lambda stage: ends.append(stage.name))
    assert equal_runs(out, expected)
    assert left == reports[-len(left) :]
    assert done in (0, 2, 4, 5)
    assert len(left) - len(reports[after - 1 :]) in (0, 1)  # at most a step is done again, with save_every=2
    assert ends[-1] == "second"


def test_a_run_may_be_stopped_again_and_again(whole, tmp_path):
    """By an error after the third step of each try; whatever is done again, the log is whole at every step."""
    expected, _, _, reports = whole
    out, tries = tmp_path / "run", []

    def on_step(report):
        assert metrics(out) == [r._asdict() for r in reports[: reports.index(report) + 1]]
        tries[-1] += 1
        if tries[-1] == 3:
            raise StoppedError

    while len(tries) < 5:
        tries.append(0)
        try:
            run(out, model=make(seed=len(tries)) if tries[1:] else make(), resume=len(tries) > 1, on_step=on_step)
        except StoppedError:
            assert len(tries) < 5
    assert tries == [3, 3, 3, 3, 2]
    assert equal_runs(out, expected)


def test_a_run_that_fails_at_its_first_step_can_be_resumed(whole, tmp_path):
    out = tmp_path / "deep" / "run"
    with pytest.raises(ValueError, match=r"^data: got no scene"):
        tune(out, make(), STAGES, [], world()[1], seed=0, about=ABOUT)
    assert metrics(out) == []
    run(out, model=make(seed=1), resume=True)
    assert equal_runs(out, whole[0])


@pytest.mark.parametrize("name", [stage.name for stage in STAGES])
def test_a_stage_end_that_failed_is_done_again(whole, name, tmp_path):
    def fail(stage):
        if stage.name == name:
            raise StoppedError

    with pytest.raises(StoppedError):
        run(tmp_path / "run", on_stage=fail)
    ends, model = [], make(seed=1)
    run(tmp_path / "run", model=model, resume=True, on_stage=lambda stage: ends.append((stage, weights(model))))
    assert ends[0][0].name == name
    assert same(ends, whole[2][-len(ends) :])
    assert equal_runs(tmp_path / "run", whole[0])


def test_a_finished_run_stays_as_it_is(whole, tmp_path):
    out, steps, model = shutil.copytree(whole[0], tmp_path / "run"), [], make(seed=1)
    run(out, model=model, resume=True, on_step=steps.append)
    assert steps == []
    assert equal_runs(out, whole[0])
    assert same(weights(model), whole[2][-1][1])


def test_a_line_that_was_cut_off_is_written_again(whole, tmp_path):
    expected, snapshots, *_ = whole
    out = shutil.copytree(snapshots[6], tmp_path / "run")
    text = (out / METRICS).read_text()
    (out / METRICS).write_text(text[:-20])
    run(out, model=make(seed=1), resume=True)
    assert equal_runs(out, expected)


def test_a_lost_log_does_not_keep_a_run_from_going_on(whole, tmp_path):
    out = shutil.copytree(whole[1][6], tmp_path / "run")
    (out / METRICS).unlink()
    run(out, model=make(seed=1), resume=True)
    assert metrics(out) == metrics(whole[0])[5:]  # from the last checkpoint


def test_how_often_a_run_is_saved_changes_nothing(whole, tmp_path):
    run(tmp_path / "run", save_every=100)
    assert equal_runs(tmp_path / "run", whole[0])
    out = shutil.copytree(whole[1][2], tmp_path / "other")
    run(out, model=make(seed=1), resume=True, save_every=3)
    assert equal_runs(out, whole[0])


CHANGED = [
    ({"seed": 1}, "seed = 0, not 1"),
    ({"stages": (STAGES[0], replace(STAGES[1], clip=0.5))}, r"stages\[1\].clip = 0.05, not 0.5"),
    ({"stages": STAGES[:1]}, "2 entries in stages, not 1"),
    (
        {"stages": STAGES[::-1]},
        r"stages\[0\].name = 'first', not 'second', .* and [0-9]+ more",
    ),
    ({"about": {**ABOUT, "scheme": "paper"}}, "about.scheme = 'anchored', not 'paper'"),
    ({"about": {**ABOUT, "size": [2, 8, 16]}}, r"about.size\[2\] = 8, not 16"),
    ({"about": {**ABOUT, "size": [2, 8]}}, "3 entries in about.size, not 2"),
    ({"about": {**ABOUT, "size": None}}, "another about.size"),
    ({"about": {**ABOUT, "source": {"mean": torch.zeros(3)}}}, "another about.source.mean"),
    ({"about": {**ABOUT, "source": {"mean": torch.zeros(4)}}}, "another about.source.mean"),
    ({"about": {**ABOUT, "source": {"mean": 3}}}, "another about.source.mean"),
    ({"about": {**ABOUT, "source": {}}}, "another about.source.mean"),
    ({"about": {**ABOUT, "more": 1}}, "about.more = None, not 1"),
    ({"about": None}, "another about.size, another about.source, about.scheme = 'anchored', not None"),
    ({"seed": 1, "about": {**ABOUT, "scheme": "paper"}}, "seed = 0, not 1, about.scheme = 'anchored', not 'paper'"),
]


@pytest.mark.parametrize(("changes", "difference"), CHANGED)
def test_a_run_does_not_go_on_with_other_settings(whole, changes, difference, tmp_path):
    out, model = shutil.copytree(whole[1][6], tmp_path / "run"), make(seed=1)
    before = weights(model)
    with pytest.raises(ValueError, match=rf"{CHECKPOINT}: its run has {difference}; resume with the same settings, or"):
        run(out, model=model, resume=True, **changes)
    assert (out / METRICS).read_bytes() == (whole[1][6] / METRICS).read_bytes()
    assert (out / CHECKPOINT).read_bytes() == (whole[1][6] / CHECKPOINT).read_bytes()
    assert same(weights(model), before)


def test_a_run_does_not_go_on_with_another_optimizer(whole, monkeypatch, tmp_path):
    out, model = shutil.copytree(whole[1][6], tmp_path / "run"), make(seed=1)
    before = weights(model)
    monkeypatch.setattr(loop, "adamw", lambda trained, **options: torch.optim.AdamW(trained, betas=(0.9, 0.999)))
    with pytest.raises(ValueError, match=r"its optimizer has betas = \(0\.9, 0\.95\), not \(0\.9, 0\.999\)"):
        run(out, model=model, resume=True)
    assert (out / METRICS).read_bytes() == (whole[1][6] / METRICS).read_bytes()
    assert (out / CHECKPOINT).read_bytes() == (whole[1][6] / CHECKPOINT).read_bytes()
    assert same(weights(model), before)


@pytest.mark.parametrize("left", [METRICS, CHECKPOINT])
def test_a_run_is_not_overwritten(whole, left, tmp_path):
    shutil.copy(whole[0] / left, tmp_path / left)
    with pytest.raises(
        FileExistsError, match=r"holds a run already, so it is left alone; resume it, or choose another"
    ):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [left]
    assert (tmp_path / left).read_bytes() == (whole[0] / left).read_bytes()


@pytest.mark.parametrize("left", [[], [METRICS]])
def test_there_is_nothing_to_resume(left, tmp_path):
    out = tmp_path / "run"
    for name in left:
        out.mkdir()
        (out / name).touch()
    message = rf"{CHECKPOINT}: no such file, expected the checkpoint of a run to resume$"
    with pytest.raises(FileNotFoundError, match=message):
        run(out, resume=True)
    with pytest.raises(FileNotFoundError, match=message):
        check_folder(out, resume=True)
    assert out.exists() == bool(left)


def test_a_folder_is_checked_before_anything_is_read(whole, tmp_path):
    check_folder(tmp_path / "new", resume=False)
    assert not (tmp_path / "new").exists()
    (tmp_path / "notes.txt").touch()
    check_folder(tmp_path, resume=False)  # it holds no run
    check_folder(whole[0], resume=True)
    for left in (METRICS, CHECKPOINT):
        shutil.copy(whole[0] / left, tmp_path / left)
        with pytest.raises(FileExistsError, match=rf"^{tmp_path}: holds a run already, so it is left alone; resume it"):
            check_folder(tmp_path, resume=False)
        (tmp_path / left).unlink()


def test_a_step_that_is_not_finite_is_not_saved(whole, tmp_path):
    """And a model that is whole again goes on before it."""
    out, model = tmp_path / "run", make()
    spoil_gradients(model, after=3, factor=NAN)
    with pytest.raises(ValueError, match=r"^first, step 4: .*the norm of its gradient nan"):
        run(out, model=model, save_every=1)
    assert load_checkpoint(out / CHECKPOINT)["training"]["step"] == 3
    assert metrics(out) == metrics(whole[0])[:3]
    assert sorted(path.name for path in out.iterdir()) == sorted([CHECKPOINT, METRICS])
    run(out, model=make(seed=1), resume=True)
    assert equal_runs(out, whole[0])


def test_a_finished_stage_is_no_checkpoint(whole, tmp_path):
    shutil.copy(whole[0] / "first.pt", tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match=f"{CHECKPOINT}: holds a finished stage, expected a checkpoint to go on from"):
        run(tmp_path, resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": []}, r"^stages: got \[\], expected at least one"),
        ({"stages": [STAGE, STAGE]}, r"^stages: got \['first', 'first'\], expected .* each with a name of its own"),
        ({"stages": [replace(STAGE, name="checkpoint")]}, r"^stages: got \['checkpoint'\], expected none whose file"),
        ({"save_every": 0}, "^save_every: got 0, expected at least 1"),
    ],
)
def test_a_run_refuses(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_stage_of_no_steps_leaves_the_weights(tmp_path):
    model, ends = make(), []
    before = weights(model)
    nothing = replace(STAGE, name="nothing", steps=0)
    run(
        tmp_path, model=model, stages=[nothing, replace(STAGE, steps=1)], on_stage=lambda s: ends.append(weights(model))
    )
    assert same(ends[0], before)
    assert same(load_checkpoint(tmp_path / "nothing.pt")["model"], before)
    assert not same(ends[1], before)
    assert [entry["stage"] for entry in metrics(tmp_path)] == ["first"]
