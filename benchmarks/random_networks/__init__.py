"""A generator of random residual networks, as Python source: one seed, one network, for ever.

It knows nothing of rmfx; the fuzz benchmark and ``tests/test_random_nets.py`` share it.
"""
