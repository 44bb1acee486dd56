"""What needs a CUDA device: every kernel there, with gradients, in half precision."""

import pytest
import torch

from lct_core.testing.conformance import kernel_conformance

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("kernel", ["sdpa", "flex"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernels_and_their_gradients(kernel, dtype):
    for finding in kernel_conformance(kernel, device="cuda", dtypes=[dtype]):
        assert finding.holds, finding
