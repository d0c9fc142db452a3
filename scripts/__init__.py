"""The commands: each is thin, and its work is in service/."""
