"""Models, tickets and rules that go to a Hub on this machine and come back, in processes of their own."""
