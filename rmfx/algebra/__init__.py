"""Linear maps and pointwise functions as values: pure tensor algebra, no graphs."""
