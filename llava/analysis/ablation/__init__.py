"""Ablations of VisPruner: one choice of the method changes, everything else stays."""
