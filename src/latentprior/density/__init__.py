"""The prior as a density: base, ratios, normaliser, samplers."""
