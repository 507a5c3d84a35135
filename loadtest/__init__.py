"""Load tests: traces, load generator, records, reports, simulator, and an engine without a model."""
