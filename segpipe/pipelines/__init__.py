"""Ray pipelines and their drivers."""
