"""Training recipes by name, and the folders that training writes."""
