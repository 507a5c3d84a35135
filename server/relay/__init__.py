"""One request at a worker: the relayed answer, its changes on the way, and the prefill leg."""
