"""The built-in networks, each found by its entry point in the group ``ridgeline.networks``.

No step imports this package: only the code of the network that is trained is in the key of a training.
"""
