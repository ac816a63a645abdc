"""The DAGs, one file each: wiring, parameters, schedule."""
