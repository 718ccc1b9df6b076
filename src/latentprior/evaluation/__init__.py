"""Metrics, the networks they see with, and densities known exactly."""
