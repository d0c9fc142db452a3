"""Programs that check a server, each with one foreign client in that client's own environment."""
