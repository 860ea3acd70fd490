"""Evaluation: questions in, answer files out, scores with confidence intervals.

`inference` runs the model, `store` keeps the answers, `benchmarks` contain formats and scoring rules. The
modules in this folder are commands: `run`, `sweep`, `score`, ... (listed by `python -m llava.eval`), and
wrappers under LLaVA's names (`model_vqa_loader`, `run_llava`, `eval_pope`, ...). Nothing is imported here, so
that `--help` is fast.
"""
