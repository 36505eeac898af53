"""The mask dataset: rows, PNG codec, run folder, reading, writing, checking."""
