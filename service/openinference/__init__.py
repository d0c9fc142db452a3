"""The Open Inference Protocol over gRPC: a server beside the gateway that asks the gateway itself.

Only server.py and what it imports need the packages of requirements-grpc.txt.
"""
