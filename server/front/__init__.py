"""Where requests arrive: the HTTP protocol, the life of a request, the routes."""
