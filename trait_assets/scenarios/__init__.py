"""Stage 0 and 0.5: trait folders read and validated, and their scenarios vetted by a judge."""
