"""What people run: the command line, the server wrapper, the playground page."""
