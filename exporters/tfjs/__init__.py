"""TensorFlow.js: its converter, its files, and the processes that run them."""
