"""An engine without a model that speaks vLLM's HTTP API."""
