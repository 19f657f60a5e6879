"""Each stage turns a recipe into a published run."""
