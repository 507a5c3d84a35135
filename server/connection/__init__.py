"""One client connection: HTTP from its bytes, what it may send and hold, and the answers that go back."""
