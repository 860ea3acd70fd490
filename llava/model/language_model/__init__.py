"""The language models that LLaVA is built on."""
