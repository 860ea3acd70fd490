"""Other programs and models that prune with this package."""
