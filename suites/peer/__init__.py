"""Side by side with the exporter that users come from, on a real checkpoint, in one environment: `tox -e peer`."""
