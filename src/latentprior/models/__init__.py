"""Latent variable models: a decoder, its prior, and networks from here and elsewhere."""
