"""Requests against a running server, measured."""
