"""What the assets are handed: models, judges, the store. Each subpackage keeps Dagster in its resource.py alone."""
