"""Sessions of runtimes that more than one format uses."""
