"""The key-value stores that gateways share: in memory, in Redis, over a Unix socket."""
