"""What proves an adapter or a kernel: the conformance suites, their tolerances, and hypothesis strategies.

``conformance`` (of adapters), ``kernels``, ``definition``, ``oracle`` and ``tolerances`` need nothing but the library;
``strategies`` needs the ``testing`` extra.
"""
