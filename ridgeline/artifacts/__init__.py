"""The artifact types, one module each: what a step reads and writes, and its files on disk.

Nothing is imported here, so that a step's key covers only the artifact types that the step uses.
"""
