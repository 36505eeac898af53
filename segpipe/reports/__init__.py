"""Score tables and the report page."""
