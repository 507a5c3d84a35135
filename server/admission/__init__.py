"""Who may run, and when: limits, the waiting queue, reservations, the policy in force."""
