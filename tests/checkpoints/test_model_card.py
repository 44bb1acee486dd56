"""The model card: how a checkpoint says that its model is made."""

import re

import pytest
import torch

from lct_core.checkpoints.model_card import ModelCard, small_mmdit
from lct_core.codec import LinearCodec

pytest.importorskip("av")


CARD = {"scheme": "paper", "size": [4, 32, 48], "area": 4096, "multiple": 8, "fps": 12.0, "max_frames": 125}


def test_a_card_there_and_back():
    codec = LinearCodec(mean=torch.zeros(12), components=torch.eye(12)[:3], vocabulary=["a", "wall"], length=2)
    source = small_mmdit(codec, width=24, depth=1, heads=2)
    state = ModelCard(source=source, **CARD).state()
    card = ModelCard.from_state({**state, "data": ["1 scenes"]}, "model.pt")
    assert {**card.state(), "source": None} == {"source": None, **CARD}
    assert card.reading == {name: CARD[name] for name in ("area", "multiple", "fps", "max_frames")}
    model, made = card.build(gradient_checkpointing=True)
    assert (model.scheme, model.gradient_checkpointing, model.batch_shots) == ("paper", True, True)
    assert len(model.backbone.blocks) == 1
    assert torch.equal(made.text("A wall"), codec.text("A wall"))
    assert torch.equal(made.encode(torch.ones(3, 1, 4, 4)), codec.encode(torch.ones(3, 1, 4, 4)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source": {}}, "source: got {}, expected a dict with ['factory'] or ['backbone', 'codec', 'options']"),
        ({"source": "a:b"}, "source: got 'a:b', expected a dict with"),
        ({"source": {"factory": "a:b", "codec": {}}}, "source: got ['codec', 'factory'], expected a dict with"),
        ({"source": {"factory": None}}, "source: got ['factory'], expected a string for factory or backbone"),
        ({"source": {"backbone": "mmdit", "options": {}, "codec": {"mean": 0}}}, "source: expected options as a dict"),
        ({"scheme": "mine"}, "scheme: got 'mine'"),
        ({"size": [4, 32]}, "size: got [4, 32], expected frames, height and width, like [4, 64, 64]"),
        ({"size": 4}, "size: got 4, expected frames, height and width"),
        ({"size": [4, 32, 0]}, "size: got [4, 32, 0], expected frames, height and width"),
        ({"area": None}, "area: got None, expected an int of at least 1"),
        ({"multiple": 8.0}, "multiple: got 8.0, expected an int of at least 1"),
        ({"max_frames": True}, "max_frames: got True, expected an int of at least 1"),
        ({"fps": 0}, "fps: got 0, expected a positive number of frames per second"),
        ({"fps": float("nan")}, "fps: got nan, expected a positive number of frames per second"),
    ],
)
def test_a_card_that_makes_no_sense(change, words):
    about = {"source": {"factory": "a:b"}, **CARD, **change}
    with pytest.raises(ValueError, match="^" + re.escape(words)):
        ModelCard(**about)
    words = f"model.pt: what it says of its model makes no sense: {words}"
    with pytest.raises(ValueError, match="^" + re.escape(words)):
        ModelCard.from_state(about, "model.pt")


def test_a_card_that_lacks_something():
    with pytest.raises(ValueError, match=r"^model\.pt: does not say its model's source, fps, expected a file of lct"):
        ModelCard.from_state({name: value for name, value in CARD.items() if name != "fps"}, "model.pt")
