"""What needs a CUDA device: every kernel there, with gradients, in half precision."""

import pytest
import torch

from lct_core import registry
from lct_core.testing.conformance import kernel_conformance

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("kernel", [name for name in registry().kernels if name != "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "with gradients"])
def test_kernels_and_their_gradients(kernel, dtype, head_dim, grad):
    findings = kernel_conformance(kernel, device="cuda", dtypes=[dtype], head_dim=head_dim, grad=grad)
    try:
        for finding in findings:
            assert finding.holds, finding
    except ValueError as error:
        if "it refuses every plan" not in str(error):
            raise
        pytest.skip(str(error))
