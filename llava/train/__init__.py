"""Training: LLaVA's two stages, full or with LoRA, on all or on pruned visual tokens."""
