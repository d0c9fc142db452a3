"""Jobs: many images taken in at once, and classified while interactive requests leave room.

Only server.py and what it imports need the packages of requirements-jobs.txt.
"""
