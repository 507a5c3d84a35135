"""One request at a worker: the relayed answer, the prefill leg, and continuing at another worker."""
