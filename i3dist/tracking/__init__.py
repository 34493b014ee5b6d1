"""What a run says of itself: metrics, logs, plots, MLflow."""
