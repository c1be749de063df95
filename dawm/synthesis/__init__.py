"""Imagined transitions: rollouts, the returns they aim at, the guards against bad ones."""
