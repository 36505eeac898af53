"""Reading of scenes, labels and image shards: the only door to pixels on disk."""
