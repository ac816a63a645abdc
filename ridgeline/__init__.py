"""Ridgeline runs pipeline steps: artifacts, their store, keys and cache, registry and command line."""
