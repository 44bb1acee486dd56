"""Fixtures that the tests of this folder share."""

import pytest

from lct_backbones.mmdit import tiny
from lct_core import retrofit

SCHEMES = ("anchored", "paper")


@pytest.fixture(scope="module", params=SCHEMES)
def model(request):
    return retrofit(tiny(), scheme=request.param)


@pytest.fixture
def fresh():
    return retrofit(tiny())
