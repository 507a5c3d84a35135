"""The life of a request from its parsed head to its last byte, the routes, and the server that listens."""
