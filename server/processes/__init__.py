"""The processes of one gateway: a supervisor that forks children, and how a child starts."""
