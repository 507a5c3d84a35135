"""OpenAI's Batch API: files of requests that run in what interactive traffic leaves of the engines."""
