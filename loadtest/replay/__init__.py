"""`evenhand replay`: a trace sent to a server, once or at rising rates, and recorded."""
