"""The mathematics of diffusion: codecs, preconditioning, samplers, denoisers."""
