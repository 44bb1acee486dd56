"""What proves an adapter or a kernel: the conformance suite, its tolerances, and hypothesis strategies.

``strategies`` needs the ``testing`` extra and is imported by its own name: ``from lct_core.testing import strategies``.
"""
