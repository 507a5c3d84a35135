"""The scheduling decisions: policies, lanes, placement. Pure and without dependencies, because vLLM loads it."""
