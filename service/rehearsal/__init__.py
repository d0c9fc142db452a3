"""A rehearsal: Kubernetes manifests played with real processes on this machine."""
