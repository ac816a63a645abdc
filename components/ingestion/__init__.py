"""Where images come from: the tfds catalog, or a folder. Each yields uint8 images of one size, and labels."""
