"""The engine: a scene goes in, and every block of a single-shot DiT sees the shots of the scene joined.

``scene.py`` checks what comes in, ``visibility.py`` says who sees whom at a site, ``joining.py`` makes one row of the
shots and rotates it, ``walk.py`` goes through blocks and sites, and ``call.py`` is one pass of it all.
"""
