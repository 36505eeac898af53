"""Exact integer geometry of tiles, cells, blocks and units: no files, no torch, no Ray."""
