"""TensorFlow Lite: the graph before it is converted, quantization, and what a file says of itself."""
