"""What the gateway costs: CPU per request and chunk, beside nginx, other gateways and earlier versions."""
