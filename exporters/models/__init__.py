"""Models: what is exported, described without torch (ModelSpec) and built from that description in a worker."""
