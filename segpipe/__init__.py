"""segpipe: batch segmentation of aerial archives on Ray."""

__version__ = "0.1.0"
