"""Scores: the scorecard (score.json), confidence intervals, paired comparison."""
