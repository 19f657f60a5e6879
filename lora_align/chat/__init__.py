"""Chat with a mix whose weights change between answers."""
