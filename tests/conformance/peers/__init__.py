"""Other servers, which the kit is held against."""
