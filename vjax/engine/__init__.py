"""The engine core and its front end."""
