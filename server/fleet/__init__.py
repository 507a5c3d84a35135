"""The workers: their load, health, roles and registration."""
