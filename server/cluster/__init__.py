"""State that gateways share, through Redis or between the processes of one gateway."""
