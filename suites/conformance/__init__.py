"""What an exported model has to do: one file a chapter."""
