"""Figures 2 and 3 of the paper for any model: `python -m llava.analysis.figures fig2|fig3`."""
