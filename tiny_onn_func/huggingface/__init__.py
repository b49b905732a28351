"""Read and write Hugging Face folders of Qwen3 and Qwen3-MoE models."""
