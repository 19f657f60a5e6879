"""Learn the weights that a person prefers, from picks between two answers."""
