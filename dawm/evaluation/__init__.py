"""What a policy earns in its environment."""
