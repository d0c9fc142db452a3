"""Commands around the handler: set up, package, serve, check and ask."""
