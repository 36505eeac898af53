"""Training data: any layout of images and labels becomes shards of encoded samples."""
