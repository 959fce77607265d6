"""A pipeline by name, a request, and the pictures it draws."""
