"""Ask and score: questions in, answer files out, numbers with their uncertainty.

`engine` asks a model, `answers` keeps what it said, `benchmarks` know the formats and the official scoring
rules, `run`, `sweep`, `score` and `model_vqa_loader` are the command lines over them. Nothing is imported
here, so that `--help` answers at once.
"""
