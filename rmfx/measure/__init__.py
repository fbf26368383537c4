"""How fast networks run, as ratios: ready-made calls per runtime, and interleaved pairs of them."""
