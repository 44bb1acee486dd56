"""Fixtures that the tests of this folder share."""

import pytest

from lct_core import attention
from lct_core.plugins.hooks import hookimpl
from lct_core.plugins.registry import Registry
from lct_core.testing import kernels
from lct_plugins.triton_attention import SPEC


def with_torchs_own(spec):
    """A registry of torch's kernels and this one alone."""

    class Plugin:
        @hookimpl
        def lct_kernels(self):
            return [spec]

    own = Registry()
    own.register(Plugin(), name="test")
    return own


@pytest.fixture
def only_triton(monkeypatch):
    """Our Triton kernel beside torch's, in a registry that forgets what it resolved."""
    own = with_torchs_own(SPEC)
    monkeypatch.setattr(attention, "registry", lambda: own)


@pytest.fixture
def conforms(monkeypatch):
    """Run the conformance suite on a kernel that may not be announced."""

    def run(spec, **options):
        own = with_torchs_own(spec)
        for module in (attention, kernels):
            monkeypatch.setattr(module, "registry", lambda: own)
        for finding in kernels.kernel_conformance(spec.name, **options):
            assert finding.holds, finding

    return run
