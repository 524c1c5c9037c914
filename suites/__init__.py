"""The suite that judges exported models: claims, verdicts, the pytest plugin and the command line."""
