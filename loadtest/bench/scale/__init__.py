"""How the gateway's cost and decisions change with workers, tenants and replicas."""
