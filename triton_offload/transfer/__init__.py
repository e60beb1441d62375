"""The worker side: how bytes move. Plans, paths, lanes, and their order."""
