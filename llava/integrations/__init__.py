"""Other programs' models and programs: pruning in transformers' own models, lmms-eval."""
