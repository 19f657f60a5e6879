"""Planning: the memory and time of each stage, before it runs."""
