"""The service measured against its peers and against the limits of the machine."""
