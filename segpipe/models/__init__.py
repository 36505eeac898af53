"""Model families and the self-describing model file."""
