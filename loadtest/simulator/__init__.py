"""Engines and gateways in virtual time, their cost model, and what is computed with them."""
