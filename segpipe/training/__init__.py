"""Training: losses, steps, checkpoints, validation, and their wiring to Ray Train."""
