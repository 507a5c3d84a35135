"""What gateways tell each other, over Redis or between the processes of one gateway."""
