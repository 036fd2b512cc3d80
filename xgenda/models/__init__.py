"""Models: descriptions, Gaussian and diffusion priors, checkpoints, the store."""
