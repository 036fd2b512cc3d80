"""Training: samples, objectives, the loop."""
