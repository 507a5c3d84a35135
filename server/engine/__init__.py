"""The wire to an engine: the HTTP client and server-sent events."""
