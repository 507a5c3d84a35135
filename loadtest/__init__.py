"""What measures: traces, load client, records, reports, the engine without a model."""
