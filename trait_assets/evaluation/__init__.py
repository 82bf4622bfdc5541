"""Stage 4: what a vector separates on held-out rows, against nulls, and across traits."""
