"""What visitors ask for, checked on the server."""
