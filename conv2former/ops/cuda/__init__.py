"""The backend for NVIDIA GPUs: Triton kernels between PyTorch's matrix products."""
