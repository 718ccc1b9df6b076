"""Generators, their latent variable models, and how they are learned."""
