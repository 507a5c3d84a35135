"""A request as data: its body, its tenant, what was received for it, the errors it can meet."""
