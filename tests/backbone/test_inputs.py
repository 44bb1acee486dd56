"""Shots on a device and in a batch."""

from dataclasses import replace

import pytest
import torch

from lct_core import ShotInput
from lct_core.backbone.inputs import collate_shots
from tests.training.scenes import same


def test_a_shot_moves_with_all_that_it_holds():
    shot = ShotInput(text=torch.zeros(1, 2, 3), extras={"mask": torch.ones(1), "rate": 3}, role="global")
    moved = shot.to("meta")
    assert (moved.role, moved.latents, moved.text.device.type) == ("global", None, "meta")
    assert moved.extras["mask"].device.type == "meta"
    assert moved.extras["rate"] == 3
    assert replace(shot, latents=torch.zeros(1, 4, 1, 2, 2)).to("meta").latents.device.type == "meta"
    assert (shot.text.device.type, shot.extras["mask"].device.type) == ("cpu", "cpu")


def test_shots_are_batched_with_their_extras():
    shots = [
        ShotInput(
            latents=torch.full((n, 1, 1, 2, 2), float(n)),
            text=torch.full((n, 2, 3), float(n)),
            extras={"rate": 3, "mask": torch.full((n, 4), n)} if n % 2 else {"mask": torch.full((n, 4), n), "rate": 3},
        )
        for n in (1, 2, 3)
    ]
    batch = collate_shots(shots)
    of = torch.tensor([1.0, 2, 2, 3, 3, 3])
    assert torch.equal(batch.latents, of.view(-1, 1, 1, 1, 1).expand(6, 1, 1, 2, 2))
    assert torch.equal(batch.text, of.view(-1, 1, 1).expand(6, 2, 3))
    assert torch.equal(batch.extras["mask"], of.long().view(-1, 1).expand(6, 4))
    assert batch.extras["rate"] == 3
    alone = collate_shots(shots[:1])
    assert same([alone.latents, alone.text, dict(alone.extras)], [shots[0].latents, shots[0].text, shots[0].extras])


GIVEN = {"text": torch.zeros(1, 2, 3), "latents": torch.zeros(1, 1, 1, 2, 2), "extras": {"rate": 3}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"role": "global"}, "^shots: got roles, shapes .* extras .*expected all alike"),
        ({"text": torch.zeros(1, 1, 3)}, "^shots: got roles, shapes .* extras .*expected all alike"),
        ({"latents": torch.zeros(1, 1, 2, 2, 2)}, "^shots: got roles, shapes .* extras .*side by side in a row"),
        ({"latents": None}, "^shots: got roles, shapes .* extras .*expected all alike"),
        ({"extras": {}}, "^shots: got roles, shapes of texts and latents, and names of extras .*expected all alike"),
        ({"extras": {"rate": 4}}, r"^extras: rate is \['3', '4'\], expected one value for all entries of a batch"),
        ({"extras": {"rate": torch.ones(1)}}, r"^extras: rate is \['3', '\[1\]'\], expected one value for all"),
    ],
)
def test_shots_that_do_not_fit_in_a_batch(changes, message):
    shots = ShotInput(**GIVEN), ShotInput(**GIVEN | changes)
    with pytest.raises(ValueError, match=message):
        collate_shots(shots)


def test_no_shot_makes_no_batch():
    with pytest.raises(ValueError, match=r"^shots: got none, expected at least one$"):
        collate_shots([])


def test_extras_that_do_not_fit_in_a_batch():
    for other in (torch.ones(1, 5), 3):
        shots = [ShotInput(**GIVEN | {"extras": {"mask": mask}}) for mask in (torch.ones(1, 4), other)]
        with pytest.raises(ValueError, match=r"^extras: mask is \['\[1, 4\]', .*expected one value"):
            collate_shots(shots)
