"""Is it equal, and is it plain: verification, comparison, counting of joins."""
