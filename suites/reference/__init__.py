"""Data that our own matrix is judged with."""
