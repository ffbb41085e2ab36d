"""Watch every medrl run in TensorBoard."""
