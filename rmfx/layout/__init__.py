"""Reserve and merge in general form: a region between fork and sum as a plain sequence of layers."""
