"""What decides: policies, lanes, placement. Pure, without dependencies, for it loads inside vLLM."""
