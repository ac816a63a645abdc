"""`ridgeline serve`: champions and canaries over the REST API of TensorFlow Serving."""
