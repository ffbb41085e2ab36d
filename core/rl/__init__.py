"""Pure reinforcement-learning arithmetic on tensors."""
