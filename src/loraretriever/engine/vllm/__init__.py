"""vLLM as the engine: servers of its own kind, or vLLM in this process. It generates; we name compositions."""
