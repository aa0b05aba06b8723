"""The command `vjax`."""
