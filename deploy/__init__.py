"""What runs it: engines as child processes, the bundled model, the command line."""
