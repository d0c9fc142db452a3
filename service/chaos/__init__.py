"""A campaign of faults against a gateway and two replicas, and the check of what clients saw."""
