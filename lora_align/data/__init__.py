"""From anybody's rows to pairs and conversations."""
