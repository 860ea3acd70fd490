"""Vision towers with a [CLS] token, behind one small interface."""
