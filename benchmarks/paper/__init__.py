"""The paper's tables and figures, measured: one script each, ``python -m benchmarks.paper.table1`` and so on."""
