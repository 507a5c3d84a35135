"""`make install`: everything that a checkout needs, in .venv. Runs before any package is installed."""
