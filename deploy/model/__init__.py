"""The model to serve: chosen, fetched, and made ready for vLLM."""
