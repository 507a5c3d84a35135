"""Starting one vLLM engine: its model, arguments, machine resources, process and log."""
