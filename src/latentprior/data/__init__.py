"""Latents and images, from whatever holds them."""
