"""Fixtures that the tests of this folder share."""

import pytest

from lct_core import attention
from lct_core.plugins.hooks import hookimpl
from lct_core.plugins.registry import Registry
from lct_core.testing import kernels


@pytest.fixture
def conforms(monkeypatch):
    """Run the conformance suite on a kernel that may not be announced."""

    def run(spec, **options):
        class Plugin:
            @hookimpl
            def lct_kernels(self):
                return [spec]

        own = Registry()
        own.register(Plugin(), name="test")
        for module in (attention, kernels):
            monkeypatch.setattr(module, "registry", lambda: own)
        for finding in kernels.kernel_conformance(spec.name, **options):
            assert finding.holds, finding

    return run
