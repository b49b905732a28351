"""Optional C kernels for CPUs: compiled when first needed, called on float32 tensors that no transform wraps."""
