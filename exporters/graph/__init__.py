"""ONNX graph passes that formats share: simplify, fp16, Q/DQ, and precision read back."""
