"""Diffusion and Gaussian machinery on plain torch tensors."""
