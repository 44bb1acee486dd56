"""Which model a cache was written with."""

import copy
import json
import pickle

import pytest
import torch

from lct_backbones.mmdit import tiny
from lct_core import Experts, retrofit
from lct_core.fingerprint import check_fingerprint
from tests.cache.models import DIFFERENT, MANY, mmdit, other, tuned


def two(low, boundary=0.5):
    return Experts(mmdit(), low, boundary=boundary)


@pytest.mark.parametrize(("wrote", "reads", "message"), DIFFERENT.values(), ids=DIFFERENT)
def test_what_differs_is_named(wrote, reads, message):
    saved = json.loads(json.dumps(wrote().fingerprint()))
    check_fingerprint(saved, wrote().fingerprint())
    with pytest.raises(ValueError, match=f"^model: its {message}"):
        check_fingerprint(saved, reads().fingerprint())


def test_experts_are_told_apart():
    saved = json.loads(json.dumps(two(mmdit()).fingerprint()))
    check_fingerprint(saved, two(mmdit()).fingerprint())
    for reads, message in (
        (two(mmdit(change=tuned)), "low-noise expert's weights differ"),
        (two(mmdit(), boundary=0.6), "boundary between its experts differs: .* by 0.5, this is 0.6"),
        (mmdit(), "class differs: it was written by 'Experts', this is 'MMDiT'"),
    ):
        with pytest.raises(ValueError, match=f"^model: its {message}"):
            check_fingerprint(saved, reads.fingerprint())


def test_a_copy_is_the_same_model():
    model = mmdit()
    saved = model.fingerprint()
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert one.fingerprint() == saved
    model.backbone.requires_grad_(False)
    assert model.fingerprint() == saved
    assert retrofit(tiny(), kernel="sdpa", batch_shots=True).fingerprint() == saved  # how it runs is not what it is


def test_every_parameter_is_looked_at():
    model = mmdit()
    before = model.fingerprint()["weights"]
    for parameter in model.backbone.parameters():
        flat = parameter.data.view(-1)
        for place in (0, -1):
            kept = flat[place].clone()
            flat[place] += 1
            assert model.fingerprint()["weights"] != before
            flat[place] = kept
    assert model.fingerprint()["weights"] == before


def test_devices_may_differ_in_the_last_bits_of_angles():
    saved = mmdit().fingerprint()
    assert len(saved["angles"]) == mmdit().backbone.head_dim // 2
    saved["angles"] = [angle * (1 + 1e-7) for angle in saved["angles"]]
    check_fingerprint(saved, mmdit().fingerprint())
    saved["angles"].pop()
    with pytest.raises(ValueError, match="RoPE frequencies differ"):
        check_fingerprint(saved, mmdit().fingerprint())
    assert other(pairing=None).fingerprint()["angles"] == []


def test_any_kind_of_weight():
    """Weights of no, one and few values, of strides and of dtypes of their own."""
    model = mmdit()
    for name, x in MANY.items():
        model.backbone.register_parameter(f"own {name}", torch.nn.Parameter(x, requires_grad=False))
    assert model.fingerprint()["dtype"] == ["bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "int8"]


def test_offloaded_weights_cannot_be_told():
    model = mmdit()
    model.backbone.video_out.to("meta")
    with pytest.raises(
        ValueError, match=r"^model: 2 of its \d+ weights .* such as 'video_out.weight': they are offloaded"
    ):
        model.fingerprint()
