"""The replay client."""
