"""What is measured and recorded about requests: metrics, traces, recordings."""
