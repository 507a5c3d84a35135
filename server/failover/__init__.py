"""Continuing a request at another worker: exactly where its stream broke, or from the beginning."""
