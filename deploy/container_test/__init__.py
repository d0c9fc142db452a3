"""The steps of deploy/container-test: build the image, look at it, run it, stop it under load."""
