"""`evenhand serve` and `evenhand worker`: from a command line to running processes."""
