"""The load generator: sends calls on time, reads streamed answers, and notes when each token arrived."""
