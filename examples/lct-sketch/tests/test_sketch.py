"""What must hold of any adapter."""

import pytest
import torch
from lct_sketch.adapter import SketchBackbone
from lct_sketch.model import tiny

from lct_core import registry, retrofit
from lct_core.testing.conformance import conformance


def test_the_registry_finds_the_adapter_by_the_models_class():
    assert isinstance(retrofit(tiny()).adapter, SketchBackbone)
    assert type(registry().build("sketch", depth=1)) is type(tiny())


@pytest.mark.parametrize("scheme", ["anchored", "paper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conformance(scheme, dtype):
    for finding in conformance(tiny, schemes=[scheme], dtypes=[dtype]):
        assert finding.holds, finding
