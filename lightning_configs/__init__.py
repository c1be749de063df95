"""Experiments, one YAML file each; `methods/` holds overlays to give as a second ``--config``."""
