"""What `evaluate` needs beside the test images: the replay check."""
