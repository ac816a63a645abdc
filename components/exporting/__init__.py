"""What `export` does to a model before it is saved: compaction."""
