"""vLLM's scheduler without a model: what the plug-in costs, and how much batch work it lets in."""
