"""What is sent: trace formats, arrivals, prompts."""
