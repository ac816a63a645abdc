"""tfds builders of our own; importing one registers it with tfds."""
