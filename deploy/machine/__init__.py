"""What this machine offers to engines: cores, memory, GPUs, and which engine gets which of them."""
