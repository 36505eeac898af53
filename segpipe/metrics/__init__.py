"""Confusion counts and the scores made of them."""
