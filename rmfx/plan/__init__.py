"""Which rewrites pay on a target: prices, choices, and plans that can be written down and followed again."""
