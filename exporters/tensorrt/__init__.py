"""TensorRT: networks from ONNX, engines from networks, and what an engine says of itself. Decided by what is there."""
