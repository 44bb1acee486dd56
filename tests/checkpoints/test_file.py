"""Checkpoint files: written whole, read back, refused where they are broken."""

import pytest
import torch

from lct_core.training import (
    load_checkpoint,
    save_checkpoint,
)
from tests.draws import draws
from tests.training.scenes import same


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


CONTENT = {
    "a": torch.arange(6.0).view(3, 2),
    "b": [1, 2.5, None, "x", (True,)],
    "c": {"d": torch.zeros(2, dtype=torch.bfloat16)},
}


def test_a_checkpoint_comes_back(tmp_path):
    save_checkpoint(tmp_path / "a.pt", CONTENT)
    saved = load_checkpoint(str(tmp_path / "a.pt"))
    assert saved.pop("format")
    assert same(saved, CONTENT)
    save_checkpoint(str(tmp_path / "a.pt"), {"a": 1})
    assert load_checkpoint(tmp_path / "a.pt")["a"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_saving_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    save_checkpoint(path, CONTENT)
    before = path.read_bytes()
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        save_checkpoint(path, {"a": lambda: None})
    assert path.read_bytes() == before

    def full(content, file):
        file.write_bytes(before[:100])
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, {"a": 1})
    assert path.read_bytes() == before


def refused(path, message):
    with pytest.raises(ValueError) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    return True


def test_a_broken_file_is_refused_with_its_path(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, CONTENT)
    whole, noise = path.read_bytes(), generator()
    inside = whole.index(b"data.pkl") + 80
    broken = [
        b"",
        b"no checkpoint\n",
        bytes(torch.randint(256, (500,), generator=noise).tolist()),
        *(whole[:length] for length in range(1, len(whole), draws(97, 1))),
        *(whole[:at] + b"\xb1\x00\xff" + whole[at + 3 :] for at in range(inside, inside + 40)),
    ]
    for content in broken:
        path.write_bytes(content)
        assert refused(path, "can't be read as a checkpoint; is the file complete?")


@pytest.mark.parametrize("content", [{"a": 1}, [1], torch.zeros(2), {"format": "lct checkpoint 0"}])
def test_a_foreign_file_is_refused_with_its_path(content, tmp_path):
    torch.save(content, tmp_path / "a.pt")
    assert refused(
        tmp_path / "a.pt", "not a checkpoint that lct tune wrote, expected one in the format 'lct checkpoint 1'"
    )


class Code:
    """What would run at loading."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return type(self.mark).touch, (self.mark,)


def test_code_in_a_file_is_not_run(tmp_path):
    mark = tmp_path / "mark"
    save_checkpoint(tmp_path / "a.pt", {"a": Code(mark)})
    assert refused(tmp_path / "a.pt", "can't be read as a checkpoint")
    assert not mark.exists()
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert mark.exists()  # it would have


def test_no_file_and_a_folder_are_no_checkpoint(tmp_path):
    for path in (tmp_path / "a.pt", tmp_path):
        with pytest.raises(
            FileNotFoundError, match=rf"^{path}: no such file, expected a checkpoint that lct tune wrote"
        ):
            load_checkpoint(path)
