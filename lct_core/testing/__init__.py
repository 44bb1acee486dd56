"""What proves an adapter or a kernel: the conformance suite, its tolerances, and hypothesis strategies.

``conformance``, ``tolerances`` and ``definition`` need nothing but the library; ``strategies`` needs the ``testing``
extra.
"""
