"""What models are tuned and measured on: objectives and evaluations that work with any model that fits."""
