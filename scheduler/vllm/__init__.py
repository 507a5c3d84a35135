"""Everything that imports vLLM: the scheduler plug-in and two corrections to the CPU build."""
