"""``lct generate`` with a codec and a model of one's own."""

import sys
import zlib
from importlib import import_module
from textwrap import dedent

import pytest
import torch

from lct_core import generation
from lct_core.checkpoints.model_card import ModelCard
from lct_core.cli import main
from lct_core.data import read_scene, write_video
from lct_core.training import save_checkpoint
from tests.cli.generate.clips import clip, refused, same

av = pytest.importorskip("av")
FACTORIES = """
    import torch
    from lct_core import registry
    from lct_core.codec import LinearCodec

    WORDS = "[shot cut] character 1 a red square the moves plain wall".split()

    class Codec(LinearCodec):
        # takes 1, 5, 9, ... frames, needs what lies beside this file, and would record gradients

        def latent_shape(self, frames, height, width):
            if frames % 4 != 1:
                raise ValueError(f"frames: got {frames}, expected 1 + 4 n")
            return super().latent_shape(frames, height, width)

        def decode(self, latents):
            from LATE import GAIN
            assert not torch.is_grad_enabled()
            return super().decode(latents).to(torch.bfloat16) * 1.001 * torch.nn.Parameter(torch.tensor(GAIN))

        def encode(self, frames):
            assert not torch.is_grad_enabled()
            return super().encode(frames)

    class Broken(LinearCodec):
        def decode(self, latents):
            return torch.ones(2) + torch.ones(3)

    def particular():
        model, codec = make()
        return model, Codec(**codec.state())

    def broken():
        model, codec = make()
        return model, Broken(**codec.state())

    def make(width=24):
        model = registry().build(
            "mmdit", channels=3, text_width=len(WORDS), width=width, depth=1, heads=2, patch=(1, 1, 1)
        )
        return model, LinearCodec(mean=torch.full((768,), 0.5), components=torch.eye(768)[:3], vocabulary=WORDS)
"""


@pytest.fixture
def own(tmp_path):
    """The name of a module in the current folder, new for every test."""
    name = f"generated_model_{zlib.crc32(str(tmp_path).encode())}"
    (tmp_path / f"{name}.py").write_text(dedent(FACTORIES).replace("LATE", f"{name}_late"))
    (tmp_path / f"{name}_late.py").write_text("GAIN = 1.0")
    yield name
    sys.modules.pop(name, None)
    sys.modules.pop(f"{name}_late", None)


def checkpoint_of(factory):
    """A checkpoint of a factory's model, untrained."""
    module, name = factory.split(":")
    model, _ = getattr(import_module(module), name)()
    card = ModelCard(
        source={"factory": factory}, scheme="anchored", size=(5, 16, 16), area=4096, multiple=16, fps=8.0, max_frames=9
    )
    content = {"about": card.state(), "stage": "bidirectional", "pattern": "bidirectional"}
    save_checkpoint("own.pt", {**content, "model": model.state_dict()})


def test_a_codec_of_ones_own(own, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        checkpoint_of(f"{own}:particular")
    path = [*sys.path]
    arguments = ["script.txt", "own.pt", "--steps", "1"]
    assert main(["generate", *arguments, "--out", "one"]) == 0
    assert sys.path == path
    assert [(*shot.shape[1:],) for shot in read_scene(tmp_path / "one").shots] == [(5, 16, 16)] * 3
    capsys.readouterr()
    line = refused(capsys, [*arguments, "--size", "4x16x16", "--out", "two"])
    assert line == "--size: frames: got 4, expected 1 + 4 n"
    write_video("given.mp4", clip(3, 16, 32), fps=8)
    line = refused(capsys, [*arguments, "--given", "1=given.mp4", "--out", "two"])
    assert line == "--given: given.mp4, of 3 x 16 x 32 as it is read: frames: got 3, expected 1 + 4 n"
    assert not (tmp_path / "two").exists()


def test_a_codec_that_fails(own, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        checkpoint_of(f"{own}:broken")
    line = refused(capsys, ["script.txt", "own.pt", "--steps", "1"])
    assert line.startswith(f"MODULE:FACTORY: the model or the codec of {own}:broken raised RuntimeError: The size of")
    assert f"{own}.py:" in line


def test_out_of_memory_is_one_line(run, capsys, monkeypatch):
    def too_large(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has none.")

    monkeypatch.setattr(generation, "causal", too_large)
    line = refused(capsys, ["script.txt", run / "causal.pt"])
    assert line == (
        "--device: cpu is out of memory; choose a smaller --size or --window, add --bf16, or with --mode causal set "
        "--storage or --on-device "
        "(CUDA out of memory. Tried to allocate 20.00 MiB)"
    )


def test_a_mistake_of_the_library_shows(run, monkeypatch):
    def mistaken(*_, **__):
        raise RuntimeError("ours")

    monkeypatch.setattr(generation, "causal", mistaken)
    with pytest.raises(RuntimeError, match="ours"):
        main(["generate", "script.txt", str(run / "causal.pt")])


def test_a_model_of_ones_own(run, own, tmp_path, monkeypatch, capsys):
    name, module = own, tmp_path / f"{own}.py"
    few = ["--steps", "2", "--causal-steps", "0", "--fps", "8"]
    assert main(["tune", str(run.parent / "data"), "--model", f"{name}:make", *few]) == 0
    arguments = ["generate", "script.txt", "runs/tune/bidirectional.pt", "--steps", "2"]
    for out in ("one", "two"):  # its weights are the checkpoint's, whatever the factory draws
        assert main([*arguments, "--out", out]) == 0
    assert same(*(read_scene(tmp_path / out).shots for out in ("one", "two")))
    assert [(*shot.shape[1:],) for shot in read_scene(tmp_path / "one").shots] == [(2, 32, 32)] * 3
    capsys.readouterr()
    monkeypatch.setattr(sys.modules[name].make, "__defaults__", (32,))
    line = refused(capsys, [*arguments[1:], "--out", "three"])
    assert line.startswith(f"runs/tune/bidirectional.pt: its weights are not of {name}:make: Error(s) in loading")
    del sys.modules[name]
    module.unlink()
    line = refused(capsys, [*arguments[1:], "--out", "three"])
    assert line == f"MODULE:FACTORY: got '{name}:make', but there is no module '{name}' here or installed"
