"""One vLLM engine as a child process: its command line, its log, its tests and its restarts."""
