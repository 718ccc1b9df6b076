"""Learning a prior from latents."""
