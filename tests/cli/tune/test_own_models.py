"""``lct tune`` with a model and a codec of one's own."""

import sys
from types import FunctionType

import pytest
import torch

import lct_core.cli.tune
from lct_core.cli import main
from lct_core.training import load_checkpoint, loop
from tests.cli.tune.scenes import FEW, STAGES, log, refused, same, weights

pytest.importorskip("av")


def test_a_model_and_an_adapter_of_ones_own(data, tmp_path, factory):
    path = [*sys.path]
    for made in ("make", "adapted"):
        assert main(["tune", str(data), "--model", f"{factory}:{made}", *FEW, "--out", made]) == 0
        saved = load_checkpoint(tmp_path / made / "bidirectional.pt")
        assert saved["about"]["source"] == {"factory": f"{factory}:{made}"}
        assert saved["about"]["area"] == 480 * 480
        assert saved["about"]["multiple"] == 16
        assert saved["about"]["size"] == [4, 32, 48]
        assert {row["stage"] for row in log(tmp_path / made)} == {*STAGES}
    assert same(weights(tmp_path / "make" / "causal.pt"), weights(tmp_path / "adapted" / "causal.pt"))
    assert not same(weights(tmp_path / "make" / "causal.pt"), saved["model"])
    assert sys.path == path


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ("", "MODULE:FACTORY: got '', expected a module and a function in it, like my_adapter:make"),
        ("{}", "MODULE:FACTORY: got '{}', expected a module and a function in it, like my_adapter:make"),
        ("no_such_module:make", "MODULE:FACTORY: got 'no_such_module:make', but there is no module 'no_such_module'"),
        ("{}:mak", "but {} has no 'mak'; what it has to call: ['registry', 'LinearCodec', 'codec', 'model', 'make'"),
        ("{}:number", "MODULE:FACTORY: {}:number is a int, expected a function that takes no argument"),
        ("{}:fails", "MODULE:FACTORY: {}:fails() raised RuntimeError: no; luck"),
        ("{}:takes", "MODULE:FACTORY: {}:takes() raised TypeError: takes() missing 1 required positional argument"),
        ("{}:nothing", "MODULE:FACTORY: {}:nothing() returned NoneType, expected (model, codec)"),
        ("{}:without_codec", "MODULE:FACTORY: {}:without_codec() returned MMDiT, expected (model, codec)"),
        ("{}:wrong_codec", "returned ['MMDiT', 'str'], expected (model, codec): a model (nn.Module) or an adapter"),
        ("{}:wrong_way_round", "returned ['LinearCodec', 'MMDiT'], expected (model, codec)"),
        ("{}:unknown_model", "no backbone handles torch.nn.modules.linear.Linear; there are: cogvideox: "),
        ("{}:other_channels", "expected [batch, 3, frames, height, width]"),
        ("{}:other_words", "prompt: "),
        ("{}:broken_codec", "MODULE:FACTORY: the model or the codec of {}:broken_codec raised RuntimeError: The size "),
        ("{}:broken_model", "MODULE:FACTORY: the model or the codec of {}:broken_model raised RuntimeError: The size "),
        ("{}:broken_codec", "/{}.py:"),
    ],
)  # fmt: skip
def test_a_factory_that_does_not_fit(data, capsys, factory, made, words):
    assert words.format(factory) in refused(capsys, [data, "--model", made.format(factory), *FEW])


def test_what_a_model_or_codec_imports_late(data, tmp_path, factory):
    module = tmp_path / f"{factory}.py"
    module.write_text(module.read_text().replace("WORDS_OF", f"{factory}_scale"))
    (tmp_path / f"{factory}_scale.py").write_text("SCALE = 0.5")
    path = [*sys.path]
    assert main(["tune", str(data), "--model", f"{factory}:late", *FEW, "--out", "run"]) == 0
    assert sys.path == path
    del sys.modules[f"{factory}_scale"]


@pytest.mark.parametrize("own", [False, True])
def test_a_mistake_of_the_library_shows(data, factory, monkeypatch, own):
    def mistaken(*_, **__):
        return torch.ones(2) + torch.ones(3)

    monkeypatch.setattr(loop, "tuning_loss", FunctionType(mistaken.__code__, vars(loop)))
    with pytest.raises(RuntimeError, match="The size of tensor"):
        main(["tune", str(data), *(["--model", f"{factory}:make"] if own else []), *FEW])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has none.\nIf reserved"),
            "CUDA out of memory. Tried to allocate 20.00 MiB",
        ),
        (None, "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000000000 bytes"),
    ],
    ids=["of a GPU", "of the CPU"],
)
@pytest.mark.parametrize("own", [False, True])
def test_out_of_memory_is_one_line(data, factory, capsys, monkeypatch, error, said, own):
    def too_large(*_, **__):
        if error is not None:
            raise error
        torch.empty(10**18)

    monkeypatch.setattr(loop, "tuning_loss", too_large)
    line = refused(capsys, [data, *(["--model", f"{factory}:make"] if own else []), *FEW])
    assert line.startswith("--device: cpu is out of memory; lower --area, --max-frames, --max-shots, --scene-batch or")
    assert line.endswith(f"{said})")


def test_a_misspelt_model_is_refused_first(data, factory, capsys, monkeypatch):
    monkeypatch.setattr(lct_core.cli.tune, "SceneFolders", None)
    assert "has no 'mak'" in refused(capsys, [data, "--model", f"{factory}:mak"])


def test_weights_are_drawn_whatever_the_machine_has(data, asked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)  # torch warns of slowness where it is to fork them all
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: None)
    assert main(["tune", str(data), *FEW]) == 0
