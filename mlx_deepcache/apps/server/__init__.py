"""The server: one worker that draws, and three families of routes that speak to it."""
