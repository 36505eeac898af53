"""The small real archive that comes with the package, and the model that segments it."""
