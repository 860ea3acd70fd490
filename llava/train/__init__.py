"""Training: LLaVA's two stages, with all or with pruned visual tokens (see `train.py`)."""
