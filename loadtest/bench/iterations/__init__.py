"""Real engines on a clock that counts work: the policies at every iteration, and the simulator's error."""
