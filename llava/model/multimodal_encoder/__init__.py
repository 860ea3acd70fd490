"""Vision towers with a [CLS] token and one small interface."""
