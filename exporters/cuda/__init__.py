"""The GPU: context, buffers, streams, events and CUDA graphs (PyCUDA on PyTorch's primary context), and NVML."""
