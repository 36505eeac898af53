"""Configuration: pydantic models at the border, parsing of YAML and overrides."""
