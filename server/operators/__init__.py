"""What operators touch: the admin API, the console, the logs."""
