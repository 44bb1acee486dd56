"""Traits that no model has."""

from dataclasses import replace

import pytest

from lct_core import Extra
from tests.toys import toy


@pytest.mark.parametrize(
    ("trait", "message"),
    [
        ({"latent_channels": None}, "latent_channels: got None, expected a positive int"),
        ({"text_width": 0}, "text_width: got 0, expected a positive int"),
        ({"head_dim": 8.0}, r"head_dim: got 8\.0, expected a positive int"),
        ({"text": "both"}, r"text: got 'both', expected one of \('joint', 'cross'\)"),
        ({"pairing": "odd"}, "pairing: got 'odd', expected one of"),
        ({"extras": {"image": Extra((None, "frames"))}}, r"extras: image has the shape \(None, 'frames'\), expected"),
        (
            {"noisy_mask": "timestep_maks"},
            r"noisy_mask: got 'timestep_maks', expected one of the extras, .*, or None",
        ),
        ({"text_mask": "mask"}, "text_mask: got 'mask', expected one of the extras"),
    ],
)
def test_traits_that_no_model_has(trait, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        replace(toy().traits, **trait)
