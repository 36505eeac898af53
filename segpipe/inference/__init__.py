"""Tiles to class bytes: the engine, without Ray."""
