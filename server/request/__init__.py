"""A request as data: its body, its tenant, the transcript of its answer, and errors."""
