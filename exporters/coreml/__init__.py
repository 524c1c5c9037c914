"""Core ML files: made with coremltools anywhere, read back anywhere, run on macOS alone."""
