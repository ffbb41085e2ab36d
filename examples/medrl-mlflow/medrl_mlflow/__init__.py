"""Record every medrl run in MLflow."""
