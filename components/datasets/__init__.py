"""The project's own tfds builders; importing one registers it with tfds."""
