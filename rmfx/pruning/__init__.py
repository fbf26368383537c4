"""Pruning: which channels go together, which say least, and the network without them."""
