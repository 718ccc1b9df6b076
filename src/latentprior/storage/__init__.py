"""Saved folders: checkpoints, model cards, the hub and output files."""
