"""Host memory: the slots that chunks live in."""
