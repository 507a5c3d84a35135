"""Real engines over HTTP, beside stock vLLM and llama.cpp."""
