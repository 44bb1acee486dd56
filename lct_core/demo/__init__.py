"""A small world in which Long Context Tuning can be seen to work, in minutes, without a GPU."""
