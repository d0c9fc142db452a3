"""A new version of a model beside the old one, judged while it takes over: docs/rollout.md."""
