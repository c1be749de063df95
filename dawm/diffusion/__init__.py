"""The mathematics of diffusion: preconditioning, samplers, denoisers."""
