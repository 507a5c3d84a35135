"""What clients and operators touch: the gateway."""
