"""Where results are kept: artifacts, manifests, row caches, metrics, and the index over them.

Belongs here: bytes, layout, hashes, atomic commits, Parquet, DuckDB. Does not: Dagster, models, judges,
and anything that knows what a stage computes.
"""
