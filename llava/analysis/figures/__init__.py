"""Figures of the paper for any model: `python -m llava.analysis.figures fig1|fig2|fig3|fig4|fig5`."""
