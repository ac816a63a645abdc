"""The pipelines, one file each: wiring, parameters, schedule."""
