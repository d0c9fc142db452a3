"""A black-box conformance kit for KServe's V1 and the Open Inference Protocol (V2).

It speaks to a server as strangers do, with clients that other people wrote, each in an environment
of its own. Nothing here imports the service or its handler.
"""
